import torch

from ddim_fast.ops import native
from ddim_fast.ops.serving import serving, serving_line

CPU = torch.device("cpu")


def test_operators_are_named_by_what_serves_them(monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", "reference")
    assert serving_line(CPU, torch.float32) == "PyTorch (conv3x3, group_norm_silu, attention, ddim_step)"
    monkeypatch.delenv("DDIM_FAST_BACKEND")
    served = serving(CPU, torch.float32)
    line = serving_line(CPU, torch.float32)
    for operator, choice in served.items():
        assert any(part.startswith(f"{choice.partition(';')[0]} (") and operator in part for part in line.split("), "))


def test_convolutions_of_8_bits_are_native_alone(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_not", "there was no compiler")
    assert serving_line(CPU, torch.int8).startswith("native (conv3x3), PyTorch (group_norm_silu, ")
