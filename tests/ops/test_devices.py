import pytest
import torch

from ddim_fast.ops.devices import pick_device


def test_a_gpu_has_its_number(monkeypatch):
    """Some of torch's functions, such as torch.cuda.set_device, refuse a device without one."""
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="'cuda:2' is not available: torch sees 2 CUDA devices"):
        pick_device("cuda:2")


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda' is not available: torch sees no CUDA device; choose auto or cpu"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="unknown device 'warp'"):
        pick_device("warp")
