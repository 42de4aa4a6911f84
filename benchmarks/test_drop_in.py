"""What changing one line of a diffusers program brings: the scheduler's step alone, and a whole DDIMPipeline, before and after.
The same bits first (on a CPU), then timed."""

import functools

import pytest
import torch
from measure import DEVICE, run
from torch.utils.flop_counter import FlopCounterMode

diffusers = pytest.importorskip("diffusers")

from ddim_fast.interop.diffusers import FastDDIMScheduler  # noqa: E402 - it needs diffusers

SCHEDULERS = {"diffusers": diffusers.DDIMScheduler, "fast-scheduler": FastDDIMScheduler}
BATCHES = [1, 64, 512, 16384] if DEVICE == "cuda" else [1, 64, 2048]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 0 if DEVICE == "cpu" else 1e-5, "bf16": 0.05}
T, STEPS = 500, 20


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
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
@pytest.mark.parametrize("batch", [1, 8])
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
