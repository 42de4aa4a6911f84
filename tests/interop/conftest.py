"""What the tests of other programs' formats share."""

from __future__ import annotations

import builtins
import io
import pickle

import pytest
import torch
from torch import nn


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
