"""What the tests share: a network that is a formula, a small random U-Net, and every implementation of the operators."""

from __future__ import annotations

import builtins
import io
import os
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn

from tests.helpers.tones import MEL, WAVEFORM

# Before anything imports Triton: without a GPU, kernels that a test asks for by name run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from ddim_fast import UNet, UNetConfig
from ddim_fast.ops import native

# What is compared in float32 is computed in float32, by convolutions on a GPU too.
torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(config, items):
    """Without a GPU, what needs one is left out."""
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


class Backend(NamedTuple):
    """An implementation under test, and where its tensors go."""

    name: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"


BACKENDS = {
    "native": Backend("native", "cpu"),
    "triton-interpreter": Backend("triton", "cpu"),
    "triton": Backend("triton", "cuda"),
    "cuda": Backend("cuda", "cuda"),
}


def _parameter(name: str):
    return pytest.param(name, marks=pytest.mark.gpu if BACKENDS[name].device == "cuda" else ())


@pytest.fixture(params=[_parameter(name) for name in BACKENDS])
def backend(request, monkeypatch) -> Backend:
    """Each fast implementation in turn, forced by DDIM_FAST_BACKEND; what it allocates is full of NaN until it is written."""
    backend = BACKENDS[request.param]
    if backend.name in ("native", "cuda") and native.module is None:
        pytest.skip(native.why_not)
    if backend.name == "cuda" and not native.has_cuda:
        pytest.skip("ddim_fast._native was built without CUDA")
    if backend.name == "triton":
        pytest.importorskip("triton")
        if backend.interpreted and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton compiles for the GPU here")
    monkeypatch.setenv("DDIM_FAST_BACKEND", backend.name)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    return backend


def _poisoned(allocate):
    def allocate_poisoned(*arguments, **options):
        tensor = allocate(*arguments, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_poisoned


class FakeNetwork(nn.Module):
    """A cheap, smooth, nonlinear stand-in for a trained network, with a U-Net's call and config."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.tensor([0.9, 0.3]))
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.calls.append(int(timesteps.reshape(-1)[0]))
        t = timesteps.float().reshape(-1, 1, 1, 1) / self.config.num_train_timesteps
        shift = 0.0 if labels is None else labels.float()[:, None, None, None] / 10
        return torch.tanh(self.weight[0] * x) + self.weight[1] * torch.sin(3 * t) + 0.05 * x.roll(1, -1) + shift


@pytest.fixture
def fake_network():
    """A function making a fake network; keywords are fields of its config."""

    def make(**fields) -> FakeNetwork:
        return FakeNetwork(UNetConfig(**{"sample_size": 8, "channel_multipliers": (1,), **fields}))

    return make


@pytest.fixture
def small_config() -> UNetConfig:
    """A class-conditional network small enough for tests, with every kind of layer."""
    return UNetConfig(
        sample_size=16,
        base_channels=16,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        attention_resolutions=(8,),
        norm_num_groups=8,
        dropout=0.1,
        num_classes=10,
        prediction_type="v_prediction",
    )


@pytest.fixture
def small_unet(small_config) -> UNet:
    """A U-Net whose weights are all random: the zeros of a fresh network would hide most mistakes."""
    torch.manual_seed(0)
    model = UNet(small_config)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()


@pytest.fixture
def recordings(tmp_path):
    """A folder of two words by two speakers, three recordings each."""
    import soundfile

    from tests.helpers.tones import RATE, tone

    folder = tmp_path / "recordings"
    for i, (word, speaker) in enumerate((w, s) for w in ("0", "1") for s in ("ann", "bob")):
        (folder / word / speaker).mkdir(parents=True)
        for take in range(3):
            soundfile.write(folder / word / speaker / f"{take}.wav", tone(200 + 150 * i + 20 * take, 1500), RATE)
    return folder


class _Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return builtins.open, (self.path, "w")


@pytest.fixture(params=["zip", "legacy", "plain pickle", "hidden in the names"])
def pickle_with_code(request, tmp_path):
    """The bytes of a pickle that would create a file; the test fails if it does."""
    target = tmp_path / "executed"
    payload = _Payload(str(target))
    if request.param == "plain pickle":
        data = pickle.dumps(payload, protocol=2)
    else:
        buffer = io.BytesIO()
        content = {payload: 1} if request.param == "hidden in the names" else {"conv_in.weight": payload}
        torch.save(content, buffer, _use_new_zipfile_serialization=request.param != "legacy")
        data = buffer.getvalue()
    yield data
    assert not target.exists()


def _damaged_pickles() -> dict[str, bytes]:
    whole = {}
    for name, is_zip in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save({"conv_in.weight": torch.zeros(99, 99)}, buffer, _use_new_zipfile_serialization=is_zip)
        whole[name] = buffer.getvalue()
    cut = {f"{name} cut off at {size}": data[:size] for name, data in whole.items() for size in (20, 150, len(data) - 100)}
    return {"empty": b"", "garbage": b"garbage" * 100, **cut}


@pytest.fixture(params=_damaged_pickles().items(), ids=lambda item: item[0])
def damaged_pickle(request) -> bytes:
    """The bytes of a file that is no whole pickle."""
    return request.param[1]


@pytest.fixture
def randomise():
    """A function that fills in what starts as zeros and ones, which would hide most mistakes."""

    def randomise(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif not parameter.any():
                    parameter.normal_(std=0.05)
        return model.eval()

    return randomise


@pytest.fixture(params=[MEL, WAVEFORM], ids=lambda config: config.kind)
def config(request):
    """An audio configuration of each kind."""
    return request.param
