"""What one line in a diffusers program brings, before and after: the scheduler's step alone, a DDIMPipeline with the scheduler
alone, and, in turns, a DDIMPipeline and a text-to-image network that are accelerated. Correct first, then timed.

    pytest benchmarks/test_drop_in.py -k accelerated --benchmark-only --benchmark-json run.json
    python benchmarks/report.py run.json --baseline "plain fp32"
"""

import copy
import functools

import pytest
import torch
from measure import DEVICE, full, run, run_in_turns
from torch.utils.flop_counter import FlopCounterMode

diffusers = pytest.importorskip("diffusers")

from ddim_fast import accelerate  # noqa: E402
from ddim_fast.interop.diffusers import FastDDIMScheduler  # noqa: E402 - it needs diffusers
from ddim_fast.ops.devices import bf16_is_fast  # noqa: E402

SCHEDULERS = {"diffusers": diffusers.DDIMScheduler, "fast-scheduler": FastDDIMScheduler}
BATCHES = [64, *full(1, 512, 16384)] if DEVICE == "cuda" else [64, *full(1, 2048)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 0 if DEVICE == "cpu" else 1e-5, "bf16": 0.05}
T, STEPS = 500, 20


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", ["fp32", *full("bf16")])
@pytest.mark.parametrize("prediction_type", ["epsilon", *full("v_prediction")])
@pytest.mark.parametrize("implementation", SCHEDULERS)
def test_step(benchmark, batch, dtype, prediction_type, implementation):
    """Both results of a step, as pipelines ask for them."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    sample, output = torch.randn(2, batch, 3, 32, 32, generator=generator, device=DEVICE).to(DTYPES[dtype])
    steps = {}
    for name, kind in SCHEDULERS.items():
        scheduler = kind(prediction_type=prediction_type)
        scheduler.set_timesteps(STEPS)
        steps[name] = functools.partial(scheduler.step, output, T, sample, return_dict=False)
    for before, after in zip(*(step() for step in steps.values()), strict=True):
        torch.testing.assert_close(after, before, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    benchmark.group = f"{prediction_type} {dtype} batch {batch}"
    run(benchmark, steps[implementation], DTYPES[dtype], moved=4 * sample.numel() * sample.element_size())


@functools.cache
def _unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.mark.skipif(DEVICE == "cuda", reason="a pipeline copies its images to the host, so no CUDA graph can hold it")
@pytest.mark.parametrize("batch", [1, *full(8)])
@pytest.mark.parametrize("implementation", SCHEDULERS)
def test_pipeline(benchmark, batch, implementation):
    """A small network, so that what is not the network can be seen at all."""
    calls = {}
    for name, kind in SCHEDULERS.items():
        pipe = diffusers.DDIMPipeline(_unet(), diffusers.DDIMScheduler())
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        calls[name] = functools.partial(_images, pipe, batch)
    assert torch.equal(calls["diffusers"](), calls["fast-scheduler"]())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _unet()(torch.zeros(batch, 3, 32, 32), T)
    benchmark.group = f"DDIMPipeline batch {batch}"
    run(benchmark, calls[implementation], torch.float32, moved=0, operations=STEPS * counter.get_total_flops())


def _images(pipe, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(batch, generator, num_inference_steps=STEPS, output_type="pt").images


# (what accelerate is given, or None for the plain thing; what that is converted to beforehand)
VARIANTS = {
    "plain fp32": (None, torch.float32),
    "accelerated fp32": ({}, torch.float32),
    "plain bf16": (None, torch.bfloat16),
    "accelerated bf16": ({"dtype": torch.bfloat16}, torch.float32),
}
if DEVICE == "cuda":
    VARIANTS["captured bf16"] = ({"dtype": torch.bfloat16, "engine": "captured"}, torch.float32)
if not bf16_is_fast(torch.device(DEVICE)):
    VARIANTS = {name: variant for name, variant in VARIANTS.items() if name.endswith("fp32")}
# Of the root mean square: of images after a run, and of the prediction of one call.
RUN_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
CALL_TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}


def _relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _cifar10_unet() -> torch.nn.Module:
    """The 35.7M network that is published as google/ddpm-cifar10-32, with random weights."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    ).eval()


def _text_to_image_unet() -> torch.nn.Module:
    """Stable Diffusion 1's network with random weights; on a CPU with half its channels."""
    torch.manual_seed(0)
    widths = (320, 640, 1280, 1280) if DEVICE == "cuda" else (160, 320, 640, 640)
    return diffusers.UNet2DConditionModel(
        sample_size=64 if DEVICE == "cuda" else 32, block_out_channels=widths, cross_attention_dim=768
    ).eval()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", [8, *full(1)], ids=lambda n: f"batch{n}")
def test_accelerated_pipeline(benchmark, subtests, batch):
    unet = _cifar10_unet().to(DEVICE)
    steps = STEPS if DEVICE == "cuda" else 2
    calls, exact = {}, None
    for name, (options, dtype) in VARIANTS.items():
        with subtests.test(name):
            pipe = diffusers.DDIMPipeline(copy.deepcopy(unet).to(dtype), diffusers.DDIMScheduler())
            pipe.set_progress_bar_config(disable=True)
            if options is not None:
                report = accelerate(pipe, **options)
                assert not report.left_alone, report
            images = _sampled(pipe, batch, steps)
            exact = images if exact is None else exact
            # What is plain in bf16 begins with other noise: its dtype is the network's.
            assert name == "plain bf16" or _relative_error(images, exact) < RUN_TOLERANCE[name.split()[1]]
            calls[name] = functools.partial(_sampled, pipe, batch, steps)
    benchmark.group = f"DDIMPipeline cifar10 batch {batch}"
    run_in_turns(benchmark, calls, evaluations=steps * batch)


def _sampled(pipe, batch: int, steps: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return pipe(batch, generator, num_inference_steps=steps, output_type="pt").images.cpu()


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", [2], ids=lambda n: f"batch{n}")
@torch.no_grad()
def test_accelerated_text_to_image_network(benchmark, subtests, batch):
    """One evaluation, of an image with and without its text as classifier-free guidance wants it."""
    unet = _text_to_image_unet().to(DEVICE)
    size = unet.config.sample_size
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(batch, 4, size, size, generator=generator, device=DEVICE)
    text = torch.randn(batch, 77, 768, generator=generator, device=DEVICE)
    calls, exact = {}, None
    for name, (options, dtype) in VARIANTS.items():
        with subtests.test(name):
            model = copy.deepcopy(unet).to(dtype)
            if options is not None:
                report = accelerate(model, **options)
                assert not report.left_alone, report
            own = dtype if options is None else torch.float32
            call = functools.partial(_predicted, model, x.to(own), text.to(own))
            exact = call() if exact is None else exact
            assert _relative_error(call(), exact) < CALL_TOLERANCE[name.split()[1]]
            calls[name] = call
    benchmark.group = f"UNet2DConditionModel {size}x{size} batch {batch}"
    run_in_turns(benchmark, calls, evaluations=batch)


def _predicted(model, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return model(x, T, text).sample.cpu()
