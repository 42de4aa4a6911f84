"""A local web page for a model: ``python -m ddim_fast.demo``."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .cli.options import MODEL_HELP
from .cli.parser import CommandParser, run_command
from .cli.progress import notice
from .cli.samplers import load_sampler, require_pictures
from .io.decoding import opaque
from .io.pictures import image_grid, to_uint8
from .models.checkpoint import DEFAULT_MODEL
from .ops.devices import pick_device

if TYPE_CHECKING:
    import gradio
    from torch import Tensor

    from .cli.samplers import AnySampler
    from .models.config import UNetConfig

_EXAMPLES = """\
  python -m ddim_fast.demo
  python -m ddim_fast.demo --model runs/photos --port 8000
"""

_MAX_STEPS = 100
_MAX_IMAGES = 20

# Numbers of steps whose samplers, with their recorded runs, are kept.
_SAMPLERS = 4

# Small images are shown without smoothing.
_PIXELS = "#sampled img { image-rendering: pixelated; }"

# Approximate width of an image on the page, in pixels.
_SHOWN = 512

# Gradio's list of classes has no "none": this number stands for it.
_NO_CLASS = -1


def _parser() -> CommandParser:
    p = CommandParser("demo", "Serve a local web page: sample, interpolate, and inpaint.", _EXAMPLES)
    p.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help=MODEL_HELP)
    p.add_argument("--device", metavar="DEVICE", default="auto", help="auto, cpu or cuda")
    p.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on; 0.0.0.0 accepts other machines"
    )
    p.add_argument("--port", metavar="N", type=int, default=7860, help="port to listen on; 0 takes a free one")
    return p


@dataclass(frozen=True)
class DemoSettings:
    """The command's settings, from its options."""

    model: str
    device: str
    host: str
    port: int


def main() -> None:
    parser = _parser()
    settings = DemoSettings(**vars(parser.parse_args()))
    if not 0 <= settings.port < 2**16:
        parser.error(f"--port must be in 0..65535; got {settings.port}")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no usage reports
    with parser.usage_errors():
        _check_address(settings.host, settings.port)
    try:
        with notice("loading Gradio"):
            import gradio
    except ModuleNotFoundError as error:  # of Gradio, or of what it needs
        raise RuntimeError(f"the page needs {error.name}: pip install 'ddim_fast[demo]'") from None
    with parser.usage_errors():
        device = pick_device(settings.device)
    with notice(f"loading {settings.model}"):
        studio = DemoModel(load_sampler(parser, settings.model, device))
    require_pictures(parser, settings.model, studio.sampler_of(20), "the page shows images")
    page = make_page(studio, settings.model)
    # Gradio's own fonts would be fetched from the network.
    theme = gradio.themes.Default(font="sans-serif", font_mono="monospace")
    where = {"server_name": settings.host, "server_port": settings.port or None}
    _, url, _ = page.launch(**where, theme=theme, css=_PIXELS, footer_links=[], quiet=True, prevent_thread_lock=True)
    print(f"open {url} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()


def _check_address(host: str, port: int) -> None:
    """Check that the page can be served at this address.

    Raises:
        ValueError: the address or port is not available.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise ValueError(f"--host {host} --port {port}: {reason}; --port 0 takes a free port") from None


class DemoModel:
    """The model behind the page; makes its pictures, (height, width, channels) uint8.

    Args:
        sampler: the model's sampler, of images or of latents.
    """

    def __init__(self, sampler: AnySampler) -> None:
        self._sampler = sampler
        self.sampler_of = functools.lru_cache(_SAMPLERS)(self._make_sampler)
        self.config: UNetConfig = sampler.config
        self.image_shape: tuple[int, int, int] = sampler.image_shape

    def _make_sampler(self, steps: int) -> AnySampler:
        """The sampler with ``steps`` steps; all share one network."""
        from .diffusion.latent import LatentSampler
        from .diffusion.sampler import Sampler
        from .engine import fastest_engine

        denoiser = self._sampler.denoiser
        # A plan on a CPU is recorded in a fraction of a second; torch.compile, which a GPU needs for it, takes a minute.
        fast = denoiser.device.type == "cpu" and fastest_engine(denoiser.device, denoiser.dtype) == "captured"
        sampler = Sampler(denoiser, steps=steps, engine="captured" if fast else "eager")
        if isinstance(self._sampler, LatentSampler):
            return LatentSampler(sampler, self._sampler.codec.autoencoder)
        return sampler

    @property
    def classes(self) -> list[tuple[str, int]]:
        """Name and number of each class; the first is "none"."""
        names = self.config.class_names or [str(i) for i in range(self.config.num_classes or 0)]
        return [("none", _NO_CLASS), *((name, i) for i, name in enumerate(names))]

    @property
    def guidance(self) -> float:
        """The initial guidance scale."""
        return self.config.guidance or 1.0

    def sample(self, steps: int, seed: int, count: int, label: int, guidance: float) -> list[tuple[np.ndarray, str]]:
        """``count`` images from consecutive seeds, in the model's size and channels, each with its caption."""
        seeds = range(int(seed), int(seed) + int(count))
        images = self.sampler_of(int(steps)).sample(seeds=seeds, **self._condition(label, guidance))
        pictures = to_uint8(images.cpu())
        if pictures.shape[-1] == 1:
            pictures = pictures[..., 0]
        return [(picture, f"seed {s}") for picture, s in zip(pictures, seeds, strict=True)]

    def interpolate(self, steps: int, first: int, second: int, frames: int, label: int, guidance: float) -> np.ndarray:
        """The images interpolated between two seeds, in one grid."""
        import torch

        from .diffusion.interpolation import slerp

        sampler = self.sampler_of(int(steps))
        noise = sampler.noise([int(first), int(second)])
        x_T = slerp(noise[0], noise[1], torch.linspace(0, 1, int(frames)))
        return self._picture(sampler.sample(x_T=x_T, **self._condition(label, guidance)))

    def example(self, seed: int, label: int) -> np.ndarray:
        """One image, to paint on."""
        return self._picture(self.sampler_of(20).sample(seeds=[int(seed)], **self._condition(label, self.guidance)))

    def inpaint(self, painted: dict[str, Any], steps: int, seed: int, label: int) -> np.ndarray:
        """The image with its painted part sampled anew.

        Args:
            painted: the value of Gradio's editor: ``background``, the picture, and ``layers``, whose opaque pixels are painted.
        """
        import torch

        from .diffusion.degradations import Mask

        if painted["background"] is None:
            raise ValueError("there is no image: take one of the model's or upload one")
        image = self._small(painted["background"])
        opacity = [np.asarray(_square(layer.getchannel("A"), self.image_shape[1])) for layer in painted["layers"]]
        unknown = np.any(opacity, axis=0)
        if not unknown.any():
            raise ValueError("nothing is painted: paint over the part to sample anew")
        mask = Mask(torch.from_numpy(~unknown))
        options = {"labels": self._condition(label, None)["labels"], "seeds": [int(seed)]}
        return self._picture(self.sampler_of(int(steps)).restore(mask(image[None]), mask, **options))

    def _small(self, image: Image.Image) -> Tensor:
        """(C, H, W) in [-1, 1], of the model's size."""
        import torch

        channels, size, _ = self.image_shape
        pixels = np.atleast_3d(np.array(_square(opaque(image).convert("L" if channels == 1 else "RGB"), size)))
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1

    def _condition(self, label: int, guidance: float | None) -> dict[str, Any]:
        """Class and guidance, as the sampler takes them."""
        return {"labels": None, "guidance": None} if label == _NO_CLASS else {"labels": label, "guidance": guidance}

    def _picture(self, images: Tensor) -> np.ndarray:
        """The images enlarged, several of them in a grid."""
        picture = image_grid(images.cpu(), columns=5) if len(images) > 1 else to_uint8(images.cpu())[0]
        scale = max(1, _SHOWN // self.image_shape[2] // (2 if len(images) > 1 else 1))
        return np.kron(picture, np.ones((scale, scale, 1), np.uint8)).repeat(3 // picture.shape[2], axis=2)


def make_page(studio: DemoModel, name: str) -> gradio.Blocks:
    """Build the page without serving it."""
    import gradio as gr

    has_classes = studio.config.num_classes is not None

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        """Show a ValueError of ``function`` on the page."""

        def call(*values: Any) -> Any:
            if any(value is None for value in values):
                raise gr.Error("a field is empty", print_exception=False)
            try:
                return function(*values)
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from None

        return call

    def steps() -> gr.Slider:
        return gr.Slider(1, _MAX_STEPS, value=20, step=1, label="Steps")

    def seed(label: str = "Seed", value: int = 0) -> gr.Number:
        return gr.Number(value, precision=0, minimum=0, label=label)

    def label() -> gr.Dropdown:
        return gr.Dropdown(studio.classes, value=studio.classes[-1][1], label="Class", visible=has_classes)

    def guidance() -> gr.Slider:
        most = max(5, studio.guidance)
        return gr.Slider(1, most, value=studio.guidance, step=0.5, label="Guidance", visible=has_classes)

    def result(name: str) -> gr.Image:
        return gr.Image(label="Result", format="png", interactive=False, buttons=["download", "fullscreen"], elem_id=name)

    with gr.Blocks(title="ddim_fast", analytics_enabled=False) as page:
        gr.Markdown(f"# ddim_fast\nDDIM with the model `{name}`")
        with gr.Tab("Sample"), gr.Row():
            with gr.Column():
                count = gr.Slider(1, _MAX_IMAGES, value=9, step=1, label="Images")
                inputs = [steps(), seed(), count, label(), guidance()]
                go = gr.Button("Sample", variant="primary")
            images = gr.Gallery(
                label="Images",
                format="png",
                columns=3,
                object_fit="contain",
                interactive=False,
                buttons=["download", "download_all", "fullscreen"],
                elem_id="sampled",
            )
            go.click(told(studio.sample), inputs, images)
        with gr.Tab("Interpolate"), gr.Row():
            with gr.Column():
                count = gr.Slider(2, _MAX_IMAGES, value=10, step=1, label="Frames")
                inputs = [steps(), seed("From seed", 3), seed("To seed", 13), count, label(), guidance()]
                go = gr.Button("Interpolate", variant="primary")
            go.click(told(studio.interpolate), inputs, result("interpolated"))
        with gr.Tab("Inpaint"), gr.Row():
            with gr.Column():
                first, chosen = seed(), label()
                take = gr.Button("Take an image of the model's")
                editor = gr.ImageEditor(
                    label="Paint over the part to sample anew",
                    type="pil",
                    format="png",
                    sources=("upload", "clipboard"),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=40, colors=["#ff4000"], color_mode="fixed"),
                    canvas_size=(_SHOWN, _SHOWN),
                    buttons=[],
                )
                take.click(told(studio.example), [first, chosen], editor)
                inputs = [editor, steps(), seed("Seed of the new part", 1), chosen]
                go = gr.Button("Inpaint", variant="primary")
            go.click(told(studio.inpaint), inputs, result("inpainted"))
    return page


def _square(image: Image.Image, size: int) -> Image.Image:
    """The central square of an image, resized by averaging pixels; undoes the page's enlargement exactly."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BOX, (left, top, left + side, top + side))


if __name__ == "__main__":
    run_command(main)
