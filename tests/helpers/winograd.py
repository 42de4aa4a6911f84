"""The 3x3 convolution of 8-bit numbers, written out, for the tests of those that are fast."""

import torch

from ddim_fast.ops.conv3x3 import conv3x3_components


def int8_by_hand(x, weight, limits, upsample):
    """F(2x2, 3x3) with products of numbers rounded to 8 bits, in float64, component by component. limits: (16,)."""
    n, c, h, w = x.shape
    tiles = conv3x3_components(x, upsample=upsample).double().unflatten(1, (n, c, -1))
    step = (limits / 127).double().reshape(16, 1, 1, 1)
    pixels = (tiles / step).round().clamp(-128, 127) * step
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    weights = torch.einsum("ia,kcab,jb->ijkc", g, weight.double(), g).flatten(0, 1)
    unit = weights.abs().amax(2, keepdim=True) / 127
    sums = torch.einsum("ikc,ncti->nkti", (weights / unit).round() * unit, pixels.permute(1, 2, 3, 0)).unflatten(3, (4, 4))
    a = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float64)
    scale = 2 if upsample else 1
    rows, columns = -(-h * scale // 2), -(-w * scale // 2)
    out = torch.einsum("pi,nktij,qj->nktpq", a, sums, a).unflatten(2, (rows, columns))
    return out.permute(0, 1, 2, 4, 3, 5).reshape(n, -1, 2 * rows, 2 * columns)[..., : h * scale, : w * scale]
