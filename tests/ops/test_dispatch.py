import torch

from ddim_fast.ops.torch_private import is_observed


class _Flag(torch.nn.Module):
    def forward(self, x):
        return x + 1 if is_observed() else x - 1


def test_what_is_compiled_is_not_taken_for_an_export():
    """As torch.compiler.is_exporting() is under torch.compile before torch 2.13; the fast operators would be lost there."""
    x = torch.zeros(2)
    assert not is_observed()
    assert torch.equal(torch.compile(_Flag(), fullgraph=True, backend="eager")(x), x - 1)
    for strict in (False, True):
        assert torch.equal(torch.export.export(_Flag(), (x,), strict=strict).module()(x), x + 1)
    assert torch.equal(torch.compile(_Flag(), fullgraph=True, backend="eager")(x), x - 1)
