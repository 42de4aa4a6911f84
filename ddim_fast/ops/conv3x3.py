"""The 3x3 convolution of a U-Net's blocks, which take most of its time."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .add_bias import add_bias, add_bias_reference, adds_in_one_pass
from .capturing import is_traced
from .conv3x3_arguments import KERNELS, Prepared, check, check_prepared, is_transposed, result_shape
from .dispatch import Implementation, choose, why_not_triton
from .measured import bf16_products, is_faster_in_cpp, is_faster_on_gpu
from .tensors import address, explain_refusal, resolved
from .torch_private import is_observed
from .weight_cache import cached, converted, forget

__all__ = ["Prepared", "conv3x3", "conv3x3_cached", "conv3x3_components", "conv3x3_reference", "prepare_conv3x3"]


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    upsample: bool = False,
    prepared: Prepared | None = None,
) -> Tensor:
    """A 3x3 convolution with stride 1 that keeps the image's size, with the operations around it in a U-Net:

        out = convolution(upsampled(x), weight) + bias + residual

    Args:
        x: (N, C, H, W), floating-point, of any layout; channels_last is the fast one.
        weight: (K, C, 3, 3), in the dtype of ``x``; or (K, C, 1, 3) for signals, images of height 1.
        bias: (K,), in the dtype of ``x`` or float32.
        residual: of the result's shape and dtype, added to it.
        upsample: repeat each pixel of ``x`` in both directions first (nearest neighbour), of signals along their width.
        prepared: the result of :func:`prepare_conv3x3`, for inference; ``weight`` is used only where a gradient is recorded, or
            the preparation does not serve.

    Returns:
        (N, K, H, W), or (N, K, 2 H, 2 W) if ``upsample``, of signals (N, K, 1, 2 W), in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit; the message names the tensor.
        TypeError: an argument is no tensor.
    """
    is_plain = prepared is None
    try:
        if prepared is not None and is_transposed(prepared) and not upsample:
            prepared = None  # which serves enlarged images alone
        is_plain = prepared is None or is_observed() or _records_gradient(x, bias, residual)
        if prepared is None or is_plain:
            # What PyTorch would compute of other tensors; the rest it refuses itself, and then check says what it is.
            misfits = x.ndim != 4 or weight.shape[2:] not in KERNELS or not x.is_floating_point() or x.device != weight.device
            if misfits or (bias is not None and bias.device != x.device):
                check(x, weight, bias, residual, upsample)
            if residual is not None and (residual.dtype != x.dtype or residual.shape != result_shape(x, weight, upsample)):
                check(x, weight, bias, residual, upsample)
            return _run_pytorch(x, weight, bias, residual, upsample)
        check_prepared(x, prepared, bias, residual, upsample)
        if is_transposed(prepared):
            return _run_transposed(x, prepared[0], bias, residual)
        return (_registered if is_traced() else _run_native)(x, list(prepared), bias, residual, upsample)
    except Exception as error:
        optional = {"bias": bias, "residual": residual}
        explain_refusal("conv3x3", error, {"x": x, "weight": weight} if is_plain else {"x": x}, optional)
        if is_plain:
            check(x, weight, bias, residual, upsample)
        raise


def conv3x3_cached(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, upsample: bool = False
) -> Tensor:
    """:func:`conv3x3` that prepares the weights at their first use, and again when they have changed (see
    :func:`ddim_fast.ops.weight_cache.cached`): for the networks of other libraries.

    ``weight`` may have another dtype than ``x`` and the result. Where a gradient is recorded, nothing is prepared, and the
    prepared weights are dropped.
    """
    try:
        if is_observed() or _records_gradient(x, weight, bias, residual):
            forget(weight)
        elif not torch.compiler.is_compiling():
            return _run_cached(x, weight, bias, residual, upsample)
        elif _is_prepared(x.device, x.dtype, *weight.shape[:2]):
            return _registered_cached(x, weight, bias, residual, upsample)
        return conv3x3(x, weight.to(x.dtype), bias, residual=residual, upsample=upsample)
    except Exception as error:
        explain_refusal("conv3x3", error, {"x": x, "weight": weight}, {"bias": bias, "residual": residual})
        raise


def conv3x3_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, upsample: bool = False
) -> Tensor:
    """The operator in PyTorch's own: differentiable, on any device. Arguments as :func:`conv3x3`."""
    rows = weight.shape[2]
    if upsample:
        x = _enlarged(x, 2 if rows == 3 else 1)
    out = F.conv2d(x, weight, None if bias is None else bias.to(weight.dtype), padding=(rows // 2, 1))
    return out if residual is None else out + residual


def prepare_conv3x3(
    weight: Tensor, dtype: torch.dtype, limits: Tensor | None = None, *, size: tuple[int, int] | None = None
) -> Prepared | None:
    """The weights of :func:`conv3x3` transformed for the fastest implementation: on a CPU Winograd's algorithm in C++ (Lavin
    and Gray 2016). Each output and pair of channels takes 4 products by F(2x2, 3x3) and 2.25 by F(4x4, 3x3), instead of 9.
    F(4x4, 3x3) is for float32 on images that are large enough; its error is that of a direct convolution in float32 (8e-7
    relative, with 256 channels), three times that of F(2x2, 3x3). DDIM_FAST_CONV3X3=exact does without it.

    On a GPU images that are to be upsampled are convolved by a transposed convolution with stride 2, whose 4x4 weights are sums
    of the 3x3 ones: 4 products instead of 9, and the large image is not made. It takes a committed result, or
    DDIM_FAST_BACKEND=triton.

    Args:
        weight: (K, C, 3, 3) or (K, C, 1, 3) on the device where it will be used.
        dtype: of the images.
        limits: (16,) for products of 8-bit numbers: components of the transformed pixels, see :func:`conv3x3_components`, are
            rounded to 255 levels in [-limit, limit]. Weights have a scale for each component and output channel.
        size: (H, W) of most of the images, where none are to be upsampled. It decides which algorithm is the faster one;
            images of any size are convolved correctly. None is F(2x2, 3x3).

    Returns:
        The argument ``prepared`` of :func:`conv3x3`: four times as large as the weights for F(4x4, 3x3), 1.8 times for
        F(2x2, 3x3) and for the transposed convolution, less in narrower dtypes. None where PyTorch's convolution serves, which
        takes the weights as they are.

    Raises:
        ValueError: ``limits`` are given, or DDIM_FAST_BACKEND=native, and cannot be served; the message says why.
    """
    if weight.ndim != 4 or weight.shape[2:] not in KERNELS or not weight.is_floating_point():
        raise ValueError(
            "conv3x3: weight must be floating-point numbers of shape (K, C, 3, 3) or (K, C, 1, 3); "
            f"got {weight.dtype} of {tuple(weight.shape)}"
        )
    request = _Weight(weight, dtype, limits, size)
    if limits is None:
        return choose("conv3x3", IMPLEMENTATIONS, request).run(request)
    reason = _why_not_native(request)
    if reason is not None:
        raise ValueError(f"conv3x3 has no 8-bit products here: {reason}")
    return _prepare_native(request)


def conv3x3_components(x: Tensor, *, upsample: bool = False) -> Tensor:
    """The transformed pixels B^T d B of Winograd's F(2x2, 3x3), the factors of its products (Lavin and Gray 2016, eq. 8).

    Args:
        x: (N, C, H, W), floating-point.
        upsample: as of :func:`conv3x3`.

    Returns:
        (16, N * C * tiles) float32: for each component, its values in all tiles.
    """
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    rows = [[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]
    transform = torch.tensor(rows, dtype=torch.float32, device=x.device)
    height, width = x.shape[2:]
    tiles = F.pad(x.float(), (1, 1 + width % 2, 1, 1 + height % 2)).unfold(2, 4, 2).unfold(3, 4, 2)
    return torch.einsum("ia,nchwab,jb->ijnchw", transform, tiles, transform).flatten(2).flatten(0, 1)


class _Weight(NamedTuple):
    """The arguments of :func:`prepare_conv3x3`."""

    weight: Tensor
    dtype: torch.dtype
    limits: Tensor | None
    size: tuple[int, int] | None

    @property
    def tile(self) -> int:
        """Outputs along each side of a tile of Winograd's algorithm."""
        if self.limits is not None or self.dtype != torch.float32 or self.size is None or _is_exact():
            return 2
        few, many = (math.prod(-(-side // tile) for side in self.size) for tile in (4, 2))
        # With fewer tiles, reading weights that are more than twice as large costs one image more than it saves. The limit on
        # the weights' size is 75 MB each.
        is_small = math.prod(self.weight.shape[:2]) <= 2**19
        return 4 if is_small and few >= 4 and 36 * few < 16 * many else 2


def _is_exact() -> bool:
    choice = os.environ.get("DDIM_FAST_CONV3X3")
    if choice not in (None, "", "exact"):
        raise ValueError(f"DDIM_FAST_CONV3X3={choice!r} is unknown; the one choice is exact, for F(2x2, 3x3) alone")
    return bool(choice)


def _prepare_native(request: _Weight) -> Prepared:
    weight, dtype, limits = resolved(request.weight.detach()).float().contiguous(), request.dtype, request.limits
    channels, tile = weight.shape[:2], request.tile
    prepared = torch.empty(((tile + 2) ** 2, *channels), dtype=dtype if limits is None else torch.int8)
    addresses = address(weight), address(prepared)
    if limits is None:
        native.module.prepare_conv3x3(*addresses, *channels, dtype == torch.bfloat16, tile)
        return (prepared,)
    steps = (127 / limits.float()).contiguous()
    floats, integers = (torch.empty(16, channels[0], dtype=dtype) for dtype in (torch.float32, torch.int32))
    scales = steps, floats, integers
    native.module.prepare_conv3x3(*addresses, *channels, False, tile, scales=[t.data_ptr() for t in scales])
    return prepared, *scales


def _why_not_native(request: _Weight) -> str | None:
    weight, dtype, limits = request.weight, request.dtype, request.limits
    if native.module is None:
        return native.why_not
    if weight.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16 on the CPU, not {dtype} on {weight.device}"
    if limits is not None and not native.module.conv3x3_has_int8():
        return "it needs a processor with AVX-512 VNNI or AVX-VNNI"
    if limits is None and dtype == torch.bfloat16 and not native.module.conv3x3_has_bf16():
        return "it takes bfloat16 only where the processor has AVX-512 BF16"
    if weight.shape[2] != 3:
        return f"it takes 3x3 weights, not {weight.shape[2]}x{weight.shape[3]}"
    if weight.shape[0] % 16 or weight.shape[1] % 16 or not weight.numel():
        return f"it takes channels in multiples of 16, not {weight.shape[1]} and {weight.shape[0]}"
    return None


def _native_is_faster(request: _Weight) -> bool:
    """On processors with matrix units (AMX), PyTorch's convolution in bfloat16 uses them and serves."""
    if request.dtype == torch.bfloat16 and bf16_products() == "amx":
        return False
    return is_faster_in_cpp("conv3x3", request.dtype, "channels_last")


def _prepare_transposed(request: _Weight) -> Prepared | None:
    """The weights (C, K, 4, 4), or (C, K, 1, 4), of the transposed convolution with stride 2 that is an enlargement and the
    convolution. None for images that keep their size, and in float16 on a CPU, where PyTorch's transposed convolution adds in
    float16: it would have up to 2.1 times the error of PyTorch's convolution.

    Along a side, outputs 2i and 2i + 1 see the inputs i - 1, i, i and i, i, i + 1: the products with i are one, with the sum
    of two weights.
    """
    weight = request.weight.detach()
    if request.size is not None or (request.dtype == torch.float16 and weight.device.type == "cpu"):
        return None
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    sums = wide.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    down = sums if weight.shape[2] == 3 else wide.new_ones(1, 1)
    transposed = torch.einsum("ai,kcij,bj->ckab", down, wide, sums)
    return (transposed.to(request.dtype, memory_format=torch.channels_last),)


def _transposed_is_faster(request: _Weight) -> bool:
    return is_faster_on_gpu("conv3x3_enlarged", request.weight.device, request.dtype)


def _prepare_nothing(request: _Weight) -> None:
    """For PyTorch's convolution."""


# PyTorch's convolution serves under each other name, on any device.
IMPLEMENTATIONS = (
    Implementation("native", _prepare_native, _why_not_native, _native_is_faster),
    Implementation("triton", _prepare_transposed, lambda request: why_not_triton(request.weight.device), _transposed_is_faster),
    *(Implementation(backend, _prepare_nothing, lambda request: None) for backend in ("cuda", "reference")),
)


def _run_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upsample: bool) -> Tensor:
    """PyTorch's convolution; its bias and the residual are added in one pass where that is faster."""
    if (bias is None and residual is None) or not adds_in_one_pass(x):
        return conv3x3_reference(x, weight, bias, residual=residual, upsample=upsample)
    return _added(conv3x3_reference(x, weight, upsample=upsample), bias, residual)


def _run_transposed(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Enlarged and convolved by PyTorch's transposed convolution."""
    is_image = weight.shape[2] == 4
    options: Any = {"stride": (1 + is_image, 2), "padding": (int(is_image), 1)}
    if bias is None or not adds_in_one_pass(x):
        out = F.conv_transpose2d(x, weight, None if bias is None else bias.to(weight.dtype), **options)
        return out if residual is None else out + residual
    return _added(F.conv_transpose2d(x, weight, **options), bias, residual)


def _added(out: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """A convolution's result and what is added to it. Under autocast the residual may be wider; PyTorch takes that."""
    add = add_bias if residual is None or residual.dtype == out.dtype else add_bias_reference
    return add(out, bias, residual=residual)


@torch.library.custom_op("ddim_fast::conv3x3", mutates_args=())
def _registered(x: Tensor, prepared: list[Tensor], bias: Tensor | None, residual: Tensor | None, upsample: bool) -> Tensor:
    """The native operator as torch.compile sees it."""
    return _run_native(x, prepared, bias, residual, upsample)


@_registered.register_fake
def _(x: Tensor, prepared: list[Tensor], bias: Tensor | None, residual: Tensor | None, upsample: bool) -> Tensor:
    return _empty_result(x, prepared[0], upsample)


def _run_native(x: Tensor, prepared: list[Tensor], bias: Tensor | None, residual: Tensor | None, upsample: bool) -> Tensor:
    layout = torch.channels_last
    x = resolved(x).contiguous(memory_format=layout)
    residual = None if residual is None else resolved(residual).contiguous(memory_format=layout)
    bias = None if bias is None else resolved(bias).float().contiguous()
    weights, *scales = prepared
    out = _empty_result(x, weights, upsample)
    n, channels, height, width = x.shape
    native.module.conv3x3(
        [address(x), weights.data_ptr(), address(bias), address(residual), out.data_ptr()],
        [n, height, width, channels, out.shape[1]],
        upsample,
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
        _tile_of(weights),
        scales=[address(t) for t in scales] or None,
    )
    return out


@torch.library.custom_op("ddim_fast::conv3x3_cached", mutates_args=())
def _registered_cached(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upsample: bool) -> Tensor:
    """:func:`conv3x3_cached` as torch.compile sees it: the weights are prepared when it runs."""
    return _run_cached(x, weight, bias, residual, upsample).contiguous(memory_format=torch.channels_last)


@_registered_cached.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upsample: bool) -> Tensor:
    return _empty_result(x, weight.transpose(0, 1), upsample)


@torch.compiler.assume_constant_result
def _is_prepared(device: torch.device, dtype: torch.dtype, channels_out: int, channels_in: int) -> bool:
    """Whether weights of this shape are prepared; asked while compiling, when there are no weights yet."""
    request = _Weight(torch.empty(channels_out, channels_in, 3, 3, device=device), dtype, None, None)
    return choose("conv3x3", IMPLEMENTATIONS, request).backend == "native"


def _run_cached(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upsample: bool) -> Tensor:
    def prepare() -> Prepared | None:
        return prepare_conv3x3(weight.detach(), x.dtype, size=size)

    size: Any = None if upsample else tuple(x.shape[2:])
    prepared = cached(weight, ("conv3x3", x.dtype, upsample, _Weight(weight, x.dtype, None, size).tile), prepare)
    if prepared is None:
        weight = converted(weight, x.dtype)
    return conv3x3(x, weight, bias, residual=residual, upsample=upsample, prepared=prepared)


def _enlarged(x: Tensor, rows: int) -> Tensor:
    """Each pixel ``rows`` times down and twice across."""
    if not x.is_cuda or is_observed():
        return F.interpolate(x, scale_factor=(float(rows), 2.0), mode="nearest")
    return _copied_larger(x, rows)


def _copied_larger(x: Tensor, rows: int) -> Tensor:
    """:func:`_enlarged` as a copy in channels_last. Its gradient is a sum; that of interpolation becomes atomic additions under
    torch.compile on a GPU, in the images' dtype and in any order."""
    n, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]
    larger = pixels.expand(n, height, rows, width, 2, channels).reshape(n, rows * height, 2 * width, channels)
    return larger.permute(0, 3, 1, 2)


def _tile_of(weights: Tensor) -> int:
    return 4 if len(weights) == 36 else 2


def _empty_result(x: Tensor, weights: Tensor, upsample: bool) -> Tensor:
    n, _, height, width = x.shape
    scale = 2 if upsample else 1
    shape = (n, weights.shape[1], scale * height, scale * width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _records_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
