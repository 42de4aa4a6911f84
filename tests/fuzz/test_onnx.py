"""Damaged exports to ONNX: descriptions, checksums, and models whose checksums are right, as of another program's making."""

import pytest
import torch

from ddim_fast import UNet, UNetConfig
from tests.helpers.fuzzing import Fuzzer, main, mutate_bytes, mutate_json

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from ddim_fast.deploy import OnnxSampler
from ddim_fast.deploy.folder import CHECKSUMS, SCHEDULE, UNET, write_checksums
from ddim_fast.deploy.onnx_export import export_onnx

SMALL = UNetConfig(
    sample_size=4, base_channels=4, channel_multipliers=(1,), layers_per_block=1, attention_resolutions=(), norm_num_groups=2
)


def write(folder):
    torch.manual_seed(0)
    export_onnx(folder / "export", UNet(SMALL).eval().requires_grad_(False), steps=2)
    return [folder / "export" / name for name in ("config.json", SCHEDULE, CHECKSUMS, UNET, "sampler.onnx")]


def read(path):
    folder = path.parent
    if path.name != CHECKSUMS:
        write_checksums(folder)
    OnnxSampler(folder, provider="cpu", **({"steps": 1, "spacing": "linear"} if path.name == UNET else {})).load()


def mutate(random, data):
    return (mutate_json if data.startswith(b"{") else mutate_bytes)(random, data)


FUZZER = Fuzzer("onnx", write, read, mutate)


@pytest.mark.slow
def test_damaged_exports():
    FUZZER.check(100)


if __name__ == "__main__":
    main(FUZZER)
