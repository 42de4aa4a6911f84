"""One small network, exported once."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from ddim_fast import UNet, UNetConfig

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def random_unet(**fields) -> UNet:
    """A tiny network with every kind of layer, its weights all random."""
    settings = {
        "sample_size": 8,
        "base_channels": 16,
        "channel_multipliers": (1, 2),
        "layers_per_block": 1,
        "attention_resolutions": (4,),
        "norm_num_groups": 4,
    }
    torch.manual_seed(0)
    model = UNet(UNetConfig(**{**settings, **fields}))
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def make_unet():
    """The function that makes such networks; keywords are fields of the config."""
    return random_unet


class Exported(NamedTuple):
    """A network, and its parts in ONNX."""

    model: UNet
    embeddings: object
    denoise: object


@pytest.fixture(scope="session")
def exported() -> Exported:
    """A class-conditional network in float32."""
    from ddim_fast.deploy.network import export_network

    model = random_unet(num_classes=10, prediction_type="v_prediction")
    return Exported(model, *export_network(model, torch.float32, 20))


@pytest.fixture
def use_exported(exported, monkeypatch):
    """Makes export_onnx take the parts that are there, which saves seconds."""
    monkeypatch.setattr("ddim_fast.deploy.onnx_export.export_network", lambda model, dtype, opset: exported[1:])


@pytest.fixture(scope="session")
def export_folder(exported, tmp_path_factory):
    """A folder as the command writes it. Copy it before changing it."""
    from ddim_fast.deploy.onnx_export import export_onnx

    folder = tmp_path_factory.mktemp("export") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddim_fast.deploy.onnx_export.export_network", lambda model, dtype, opset: exported[1:])
        export_onnx(folder, exported.model, steps=4, source="tiny", command="python -m ddim_fast.export")
    return folder


@pytest.fixture(scope="session")
def session():
    """A function that loads a model into ONNX Runtime on the CPU."""

    def load(model):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    return load
