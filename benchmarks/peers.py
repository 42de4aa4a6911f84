"""Other programs that evaluate the same network with the same weights, to be timed beside ours in the same run.

A peer is a function (model, dtype, batch) -> evaluate. ``model`` is an unconditional :class:`ddim_fast.UNet` in float32 on
DEVICE, and ``evaluate`` takes ``batch`` images, (N, C, H, W) float32, and a timestep, () int64, both on DEVICE, and returns the
prediction as float32. Call it without gradients. A peer that is not installed, or cannot serve, skips the test, or the subtest,
that asks for it.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import DEVICE
from torch import Tensor

from ddim_fast import UNet, UNetConfig
from ddim_fast.models.checkpoint import packaged_models
from ddim_fast.models.formats.diffusers import fold_class, save_diffusers
from ddim_fast.ops import native
from ddim_fast.ops.devices import bf16_is_fast

__all__ = [
    "DTYPES",
    "IMPLEMENTATIONS",
    "PEERS",
    "Evaluate",
    "diffusers_compiled",
    "diffusers_eager",
    "network",
    "onnx_runtime",
    "openvino",
    "pipeline",
    "relative_error",
]

Evaluate = Callable[[Tensor, Tensor], Tensor]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}

# What is timed in turns: peers and our engines, each in a precision that is fast here. On a GPU float32 waits for another day:
# max-autotune compiles for minutes.
IMPLEMENTATIONS = ["diffusers bf16", "diffusers-compiled bf16", "eager bf16", "compiled bf16"]
if DEVICE == "cpu":
    IMPLEMENTATIONS = [
        *(f"{implementation} fp32" for implementation in ("diffusers", "onnxruntime", "openvino", "eager")),
        *([*IMPLEMENTATIONS, "openvino bf16"] if bf16_is_fast(torch.device("cpu")) else ["diffusers-compiled fp32"]),
        *(["eager int8"] if native.module is not None and native.module.conv3x3_has_int8() else []),
    ]


@functools.cache
def network(name: str) -> UNet:
    """What is measured: a packaged model as it is for images of no class, or a preset with random weights."""
    if name in packaged_models():
        labelled = UNet.from_pretrained(name)
        config, state = fold_class(labelled.config, labelled.state_dict(), None)
        model = UNet(config)
        model.load_state_dict(state)
    else:
        torch.manual_seed(0)
        model = UNet(UNetConfig.preset(name))
        for p in model.parameters():
            if not p.any():  # the zeros of a fresh network would cost as much and prove nothing
                torch.nn.init.normal_(p, std=0.02)
    return model.eval().requires_grad_(False).to(DEVICE)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The root mean square of the difference, as a share of that of ``exact``."""
    return float((result - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@functools.lru_cache(maxsize=1)
def pipeline(model: UNet) -> Any:
    """``model`` and its schedule as diffusers has them: the DDIMPipeline that it loads from what we export."""
    diffusers = pytest.importorskip("diffusers")
    with tempfile.TemporaryDirectory() as folder:
        save_diffusers(Path(folder), model.config, model.state_dict())
        return diffusers.DDIMPipeline.from_pretrained(folder)


def diffusers_eager(model: UNet, dtype: torch.dtype, batch: int) -> Evaluate:
    """diffusers' UNet2DModel, in the layout that is faster."""
    layout = torch.contiguous_format if dtype == torch.float32 and DEVICE == "cpu" else torch.channels_last
    unet = copy.deepcopy(pipeline(model).unet).eval().to(DEVICE, dtype, memory_format=layout)
    return lambda x, t: unet(x.to(dtype).contiguous(memory_format=layout), t, return_dict=False)[0].float()


def diffusers_compiled(model: UNet, dtype: torch.dtype, batch: int, *, mode: str = "max-autotune-no-cudagraphs") -> Evaluate:
    """The same through torch.compile; on a CPU with frozen weights, which oneDNN lays out once.

    Args:
        mode: ``max-autotune`` for CUDA graphs, where the caller makes none itself.
    """
    options = {**torch._inductor.list_mode_options(mode), "freezing": DEVICE == "cpu"}
    return torch.compile(diffusers_eager(model, dtype, batch), fullgraph=True, dynamic=False, options=options)


def onnx_runtime(model: UNet, dtype: torch.dtype, batch: int) -> Evaluate:
    """ONNX Runtime on the CPU, which has float32 there."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if dtype != torch.float32 or DEVICE != "cpu":
        pytest.skip(f"ONNX Runtime is measured in float32 on the CPU, not in {dtype} on {DEVICE}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads disturb whoever comes next
    session = onnxruntime.InferenceSession(_onnx(model, batch), options, providers=["CPUExecutionProvider"])
    return lambda x, t: torch.from_numpy(session.run(None, {"x": x.numpy(), "t": t.numpy()})[0])


def openvino(model: UNet, dtype: torch.dtype, batch: int) -> Evaluate:
    """OpenVINO on the CPU, in the precision it is told to use."""
    runtime = pytest.importorskip("openvino")
    if DEVICE != "cpu":
        pytest.skip("OpenVINO is measured on the CPU")
    options = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = runtime.Core()
    compiled = core.compile_model(core.read_model(_onnx(model, batch)), "CPU", options)
    return lambda x, t: torch.from_numpy(compiled({"x": x.numpy(), "t": t.numpy()}, share_outputs=False)[0])


PEERS = {
    "diffusers": diffusers_eager,
    "diffusers-compiled": diffusers_compiled,
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
}


@functools.lru_cache(maxsize=1)
def _onnx(model: UNet, batch: int) -> bytes:
    """``model`` in ONNX, for inputs x and t of fixed shapes."""
    pytest.importorskip("onnxscript")
    inputs = torch.zeros(batch, *model.config.image_shape), torch.tensor(0)
    # Opset 21 would bring GroupNormalization, for which ONNX Runtime has no kernel.
    program = torch.onnx.export(model, inputs, input_names=["x", "t"], opset_version=20, dynamo=True, verbose=False)
    return program.model_proto.SerializeToString()
