"""The README.md of an export."""

from __future__ import annotations

from typing import Any

from ..models.config import UNetConfig
from .folder import CHECKSUMS, SAMPLER, SCHEDULE, UNET

__all__ = ["model_card"]


def model_card(config: UNetConfig, schedule: dict[str, Any], source: str, command: str | None, parameters: int) -> str:
    """The README.md of an exported folder.

    Args:
        config: the network.
        schedule: what schedule.json holds.
        source: the name of the model.
        command: the command line, or None.
        parameters: the network's number of parameters.
    """
    settings, image = schedule["settings"], ", ".join(map(str, config.image_shape))
    chosen = ", ".join(f"{name} {'none' if value is None else value}" for name, value in settings.items())
    versions = ", ".join(f"{name} {number}" for name, number in schedule["versions"].items())
    labels = f"0 to {config.num_classes - 1}, and {config.num_classes} for no label" if config.num_classes else ""
    conditional = [
        f"| | `labels` | (N,) int64 | {labels} |",
        "| | `guidance` | () float32 | scale of classifier-free guidance; 1 for none |",
    ]
    rows = [
        "| model | tensor | shape and type | meaning |",
        "|---|---|---|---|",
        f"| `{UNET}` | `x` | (N, {image}) float32 | noisy images |",
        "| | `timesteps` | (N,) int64 | training timesteps |",
        *(conditional[:1] if labels else []),
        f"| | `prediction`, out | (N, {image}) float32 | {config.prediction_type} |",
        f"| `{SAMPLER}` | `seeds` | (N,) int64 | from 0 to 2^63 - 1, one per image |",
        f"| | `x_T` | (M, {image}) float32 | noise to start from, M = N; with M = 0 the model draws it from the seeds |",
        *(conditional if labels else []),
        f"| | `images`, out | (N, {image}) float32 | in [-1, 1], not clipped |",
    ]
    names = [f"The classes, from 0: {', '.join(config.class_names)}.", ""] if config.class_names else []
    order = "unrolled" if schedule["unroll"] else "in a loop"
    made = f"By `{command}`, with" if command else "With"
    fused = ["Fused for ONNX Runtime's CUDA provider: the models run nowhere else.", ""] if schedule["optimize"] else []
    return "\n".join(
        [
            f"# {source}, as ONNX",
            "",
            f"A diffusion network ({parameters / 1e6:.1f}M parameters) and its sampler, in {schedule['dtype']}, ONNX opset "
            f"{schedule['opset']}.",
            f"The sampler: {len(schedule['timesteps'])} steps {order}; {chosen}.",
            "",
            *fused,
            *rows,
            "",
            *names,
            f"`config.json` describes the network; `{SCHEDULE}` has the sampler's timesteps, noise levels and coefficients.",
            f"`sha256sum -c {CHECKSUMS}` checks the files.",
            "",
            "```python",
            "from ddim_fast.deploy import OnnxSampler  # needs numpy and onnxruntime, not torch",
            "",
            'images = OnnxSampler("THIS FOLDER").sample(seeds=range(4))',
            "```",
            "",
            f"{made} {versions}.",
            "",
        ]
    )
