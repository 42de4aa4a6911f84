"""What is exported to ONNX, in ONNX Runtime on a CPU, beside our own engine: the network called once a step, the whole sampler
in one call, and both with 8-bit convolutions. Correct first, then timed in turns.

    pytest benchmarks/test_onnx.py -k fashion-mnist --benchmark-only --benchmark-json run.json
    python benchmarks/report.py run.json --baseline "step by step fp32"
"""

import dataclasses

import pytest
import torch
from measure import DEVICE, full, run_in_turns
from peers import network, relative_error

from ddim_fast import Sampler, UNet
from ddim_fast.models.checkpoint import packaged_models
from ddim_fast.ops import native
from ddim_fast.ops.devices import bf16_is_fast

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

BATCH = 8
STEPS = {"fashion-mnist": 20, "cifar10-128": 4}  # a step of the large one takes half a second
# A wrong graph is off by 1 and more. Weights that were not trained amplify what 8 bits change, to 0.2, where the packaged
# model's images differ by 0.01.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "int8": 0.3}


@pytest.fixture(scope="module", params=["fashion-mnist", *full("cifar10-128")])
def case(request, tmp_path_factory):
    """The network, the number of steps, and its exports by precision."""
    from ddim_fast.deploy.onnx_export import export_onnx

    model, steps, place = _model(request.param), STEPS[request.param], tmp_path_factory.mktemp(request.param)
    for precision, dtype in (("fp32", "float32"), ("int8", "int8")):
        export_onnx(place / precision, model, steps=steps, dtype=dtype)
    return model, steps, place


def _model(name):
    """What is measured. Weights that were not trained, taken to predict the noise, make images larger than any that 8 bits are
    made for; taken to predict images, they make some of the usual size, at the same cost."""
    model = network(name)
    if name in packaged_models():
        return model
    bounded = UNet(dataclasses.replace(model.config, prediction_type="sample"))
    bounded.load_state_dict(model.state_dict())
    return bounded.eval().requires_grad_(False)


def _onnx(folder, whole):
    from ddim_fast.deploy import OnnxSampler

    sampler = OnnxSampler(folder, provider="cpu")
    assert sampler.runs_whole
    watch = None if whole else lambda state: None  # somebody who watches sees every step
    return lambda x: torch.from_numpy(sampler.sample(x_T=x.numpy(), on_step=watch))


def _torch(model, steps, dtype):
    sampler = Sampler(model, steps=steps, dtype=dtype)
    return lambda x: sampler.sample(x_T=x)


@pytest.mark.skipif(DEVICE != "cpu", reason="measured on a CPU")
@pytest.mark.timeout(900)
@torch.no_grad()
def test_onnx(benchmark, subtests, case):
    model, steps, place = case
    x = torch.randn(BATCH, *model.config.image_shape, generator=torch.Generator().manual_seed(1))
    exact = Sampler(model, steps=steps).sample(x_T=x)
    samplers = {
        f"{name} {precision}": _onnx(place / precision, whole)
        for precision in ("fp32", "int8")
        for name, whole in (("step by step", False), ("whole sampler", True))
    }
    samplers["ddim_fast fp32"] = _torch(model, steps, torch.float32)
    if bf16_is_fast(torch.device("cpu")):
        samplers["ddim_fast bf16"] = _torch(model, steps, torch.bfloat16)
    if native.module is not None and native.module.conv3x3_has_int8():
        samplers["ddim_fast int8"] = _torch(model, steps, torch.int8)
    calls, errors = {}, {}
    for name, sample in samplers.items():
        with subtests.test(name):
            errors[name] = relative_error(sample(x), exact)
            assert errors[name] < TOLERANCE[name.split()[-1]]
            calls[name] = lambda sample=sample: sample(x)
    benchmark.group = f"{'x'.join(map(str, model.config.image_shape))} batch {BATCH} steps {steps}"
    benchmark.extra_info["relative error"] = errors
    rates = run_in_turns(benchmark, calls, evaluations=steps * BATCH)
    benchmark.extra_info["images/s"] = {name: rate / steps for name, rate in rates.items()}
