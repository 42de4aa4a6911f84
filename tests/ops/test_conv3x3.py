import pytest
import torch
import torch.nn.functional as F

from ddim_fast.ops import native
from ddim_fast.ops.conv3x3 import (
    _copied_larger,
    conv3x3,
    conv3x3_cached,
    conv3x3_components,
    conv3x3_reference,
    prepare_conv3x3,
)
from tests.helpers.pairs import every_pair
from tests.helpers.winograd import int8_by_hand

HAS_BF16 = native.module is not None and native.module.conv3x3_has_bf16()

needs_native = pytest.mark.skipif(native.module is None, reason=str(native.why_not))
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not HAS_BF16, reason="needs AVX-512 BF16"))]

# Images so large that float32 is convolved by F(4x4, 3x3).
LARGE = (32, 32)

# N, C, K, H, W: odd sides, one pixel, blocks of 16 to 64 output channels and several of them, many tiles and few.
SHAPES = [
    (2, 16, 16, 8, 8),
    (3, 32, 48, 7, 5),
    (1, 64, 80, 1, 1),
    (2, 48, 192, 3, 10),
    (5, 16, 144, 17, 16),
    (1, 128, 64, 2, 1),
]


@pytest.fixture(autouse=True)
def _native(monkeypatch):
    """What the operator allocates is full of NaN until it is written."""
    monkeypatch.setenv("DDIM_FAST_BACKEND", "native")
    allocate = torch.empty

    def allocate_poisoned(*arguments, **options):
        tensor = allocate(*arguments, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", allocate_poisoned)


def make(n, c, k, h, w, dtype=torch.float32, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    x = (random(n, c, h, w) + mean).to(dtype, memory_format=torch.channels_last)
    return x, random(k, c, 3, 3) / (3 * c**0.5), random(k)


def rms(error):
    return error.double().square().mean().sqrt()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@every_pair(shape=SHAPES, upsample=[False, True], with_residual=[False, True])
def test_is_as_exact_as_pytorch(dtype, shape, upsample, with_residual):
    x, weight, bias = make(*shape, dtype)
    exact = conv3x3_reference(x.double(), weight.double(), bias.double(), upsample=upsample)
    residual = torch.randn_like(exact).to(dtype, memory_format=torch.channels_last) if with_residual else None
    if with_residual:
        exact = exact + residual
    ours = conv3x3(x, weight, bias, residual=residual, upsample=upsample, prepared=prepare_conv3x3(weight, dtype))
    theirs = conv3x3_reference(x, weight.to(dtype), bias, residual=residual, upsample=upsample)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
    assert rms(ours - exact) <= 2 * rms(theirs - exact) + 1e-7


@needs_native
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 64, 64, 32, 32)])
def test_larger_tiles_err_less_than_2e_6(shape, with_residual):
    x, weight, bias = make(*shape)
    exact = conv3x3_reference(x.double(), weight.double(), bias.double())
    residual = torch.randn_like(exact).float() if with_residual else None
    prepared = prepare_conv3x3(weight, torch.float32, size=LARGE)
    assert prepared[0].shape == (36, shape[2], shape[1])
    ours = conv3x3(x, weight, bias, residual=residual, prepared=prepared)
    assert rms(ours - exact - (0 if residual is None else residual)) <= 2e-6 * rms(exact)


@needs_native
@pytest.mark.parametrize(
    "size,components",
    [((32, 32), 36), ((8, 8), 36), ((7, 9), 36), ((4, 4), 16), ((6, 6), 16), ((1, 64), 16), (None, 16)],
)
def test_the_tile_is_chosen_by_the_size_of_the_images(size, components, monkeypatch):
    weight = make(*SHAPES[0])[1]
    assert len(prepare_conv3x3(weight, torch.float32, size=size)[0]) == components
    monkeypatch.setenv("DDIM_FAST_CONV3X3", "exact")
    assert len(prepare_conv3x3(weight, torch.float32, size=size)[0]) == 16
    monkeypatch.setenv("DDIM_FAST_CONV3X3", "fast")
    with pytest.raises(ValueError, match="DDIM_FAST_CONV3X3='fast' is unknown; the one choice is exact"):
        prepare_conv3x3(weight, torch.float32, size=LARGE)


@needs_native
def test_weights_that_would_fill_memory_have_small_tiles():
    assert len(prepare_conv3x3(torch.zeros(1024, 528, 3, 3), torch.float32, size=LARGE)[0]) == 16


@needs_native
def test_narrow_numbers_have_small_tiles():
    weight = make(*SHAPES[0])[1]
    if HAS_BF16:
        assert len(prepare_conv3x3(weight, torch.bfloat16, size=LARGE)[0]) == 16
    if native.module.conv3x3_has_int8():
        assert len(prepare_conv3x3(weight, torch.float32, torch.ones(16), size=LARGE)[0]) == 16


@needs_native
@pytest.mark.parametrize("upsample,size", [(False, None), (True, None), (False, LARGE)])
def test_the_rounding_error_of_float32_does_not_grow_with_the_channels(upsample, size):
    def relative_error(channels):
        x, weight, _ = make(1, channels, 32, 16, 16)
        exact = conv3x3_reference(x.double(), weight.double(), upsample=upsample)
        prepared = prepare_conv3x3(weight, torch.float32, size=size)
        ours = conv3x3(x, weight, upsample=upsample, prepared=prepared)
        return rms(ours - exact) / rms(exact)

    assert relative_error(1024) <= 1.25 * relative_error(64)


@pytest.mark.skipif(native.module is None or not native.module.conv3x3_has_int8(), reason="needs AVX-512 VNNI")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_8_bit_products_are_those_of_rounded_numbers(shape, upsample, dtype):
    x, weight, bias = make(*shape, dtype)
    limits = conv3x3_components(x, upsample=upsample).abs().amax(1).clamp(min=1e-3) * 0.8  # some are cut off
    residual = torch.randn_like(conv3x3_reference(x.float(), weight, upsample=upsample)).to(dtype)
    expected = int8_by_hand(x, weight, limits, upsample) + bias[:, None, None] + residual.double()
    prepared = prepare_conv3x3(weight, dtype, limits)
    ours = conv3x3(x, weight, bias, residual=residual, upsample=upsample, prepared=prepared)
    # A number halfway between two may be rounded either way: float32 and float64 differ there.
    assert rms(ours - expected) <= (1e-3 if dtype == torch.float32 else 4e-3) * rms(expected)
    alone = torch.cat([conv3x3(i[None], weight, bias, upsample=upsample, prepared=prepared) for i in x])
    assert torch.equal(alone, conv3x3(x, weight, bias, upsample=upsample, prepared=prepared))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mean_costs_no_more_than_in_pytorch(dtype):
    x, weight, bias = make(2, 64, 64, 9, 9, dtype, mean=10.0)
    exact = conv3x3_reference(x.double(), weight.double(), bias.double())
    ours = conv3x3(x, weight, bias, prepared=prepare_conv3x3(weight, dtype))
    theirs = conv3x3_reference(x, weight.to(dtype), bias)
    assert rms(ours - exact) <= 2 * rms(theirs - exact)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upsample,size", [(False, None), (True, None), (False, LARGE)])
def test_neither_batch_nor_threads_change_a_bit(dtype, upsample, size):
    x, weight, bias = make(9, 32, 80, 8, 6, dtype)
    prepared = prepare_conv3x3(weight, dtype, size=size)
    together = conv3x3(x, weight, bias, upsample=upsample, prepared=prepared)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5, 16):
            torch.set_num_threads(count)
            assert torch.equal(conv3x3(x, weight, bias, upsample=upsample, prepared=prepared), together)
            alone = [conv3x3(image[None], weight, bias, upsample=upsample, prepared=prepared) for image in x]
            assert torch.equal(torch.cat(alone), together)
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_without_bias_and_in_any_layout():
    x, weight, _ = make(2, 16, 32, 6, 6)
    prepared = prepare_conv3x3(weight, torch.float32)
    expected = F.conv2d(x, weight, padding=1)
    for same in (x, x.contiguous(), x.repeat_interleave(2, dim=3)[..., ::2]):
        torch.testing.assert_close(conv3x3(same, weight, prepared=prepared), expected, atol=1e-5, rtol=1e-5)
    residual = torch.randn(2, 32, 6, 6)
    ours = conv3x3(x, weight, residual=residual, prepared=prepared)
    torch.testing.assert_close(ours, expected + residual, atol=1e-5, rtol=1e-5)


@needs_native
def test_no_images_and_no_pixels_are_no_error():
    weight = make(1, 16, 32, 1, 1)[1]
    prepared = prepare_conv3x3(weight, torch.float32)
    for shape in ((0, 16, 4, 4), (2, 16, 0, 4)):
        assert conv3x3(torch.zeros(shape), weight, prepared=prepared).shape == (shape[0], 32, *shape[2:])


@needs_native
def test_infinities_and_nan_stay_what_they_are_nearby():
    x, weight, bias = make(1, 16, 16, 12, 12)
    x[0, 3, 0, 0] = float("nan")
    for size in (None, LARGE):
        out = conv3x3(x, weight, bias, prepared=prepare_conv3x3(weight, torch.float32, size=size))
        assert out[0, :, 0, 0].isnan().all()
        assert out[0, :, 4:, 4:].isfinite().all()


def test_gradients_are_pytorchs():
    x, weight, bias = make(1, 16, 16, 4, 4)
    prepared = prepare_conv3x3(weight, torch.float32) if native.module is not None else None
    x.requires_grad_()
    conv3x3(x, weight, bias, upsample=True, prepared=prepared).square().sum().backward()
    ours, x.grad = x.grad, None
    conv3x3_reference(x, weight, bias, upsample=True).square().sum().backward()
    assert torch.equal(ours, x.grad)


@needs_native
def test_compiles_without_a_break_and_is_a_proper_operator():
    x, weight, bias = make(2, 16, 32, 5, 4)
    prepared = prepare_conv3x3(weight, torch.float32)
    compiled = torch.compile(conv3x3, fullgraph=True)
    with torch.no_grad():
        ours = compiled(x, weight, bias, upsample=True, prepared=prepared)
        assert torch.equal(ours, conv3x3(x, weight, bias, upsample=True, prepared=prepared))
    torch.library.opcheck(torch.ops.ddim_fast.conv3x3, (x, list(prepared), bias, None, False))


@needs_native
@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(1, 32, 4, 4)}, r"x must have shape \(N, 16, H, W\)"),
        ({"x": torch.zeros(1, 16, 4, 4, dtype=torch.float64)}, "x is torch.float64 on cpu, but the weights were prepared as"),
        ({"bias": torch.zeros(16)}, r"bias must have shape \(32,\)"),
        ({"residual": torch.zeros(1, 32, 8, 8)}, r"residual must have shape \(1, 32, 4, 4\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    x, weight, bias = make(1, 16, 32, 4, 4)
    arguments = {"x": x, "weight": weight, "bias": bias, "prepared": prepare_conv3x3(weight, torch.float32)} | change
    with pytest.raises(ValueError, match=message):
        conv3x3(**arguments)


@needs_native
def test_larger_tiles_are_not_for_enlarged_images():
    x, weight, bias = make(1, 16, 32, 4, 4)
    prepared = prepare_conv3x3(weight, torch.float32, size=LARGE)
    with pytest.raises(ValueError, match="upsample is for weights that were prepared without a size"):
        conv3x3(x, weight, bias, upsample=True, prepared=prepared)


@needs_native
@pytest.mark.parametrize(
    "weight,dtype,message",
    [
        (torch.zeros(16, 24, 3, 3), torch.float32, "channels in multiples of 16, not 24 and 16"),
        (torch.zeros(16, 16, 3, 3), torch.float16, "takes float32 and bfloat16 on the CPU, not torch.float16"),
    ],
)
def test_weights_it_cannot_serve_are_left_to_pytorch(weight, dtype, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        prepare_conv3x3(weight, dtype)
    monkeypatch.delenv("DDIM_FAST_BACKEND")
    assert prepare_conv3x3(weight, dtype) is None


def test_8_bits_need_a_processor_that_has_them(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_not", "it was not built")
    with pytest.raises(ValueError, match="conv3x3 has no 8-bit products here: it was not built"):
        prepare_conv3x3(torch.zeros(16, 16, 3, 3), torch.float32, torch.ones(16))


def test_the_reference_needs_no_preparation(monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", "reference")
    assert prepare_conv3x3(torch.zeros(16, 16, 3, 3), torch.float32) is None


class TestWeightsOfSomebodyElse:
    """conv3x3_cached: prepared by itself, never stale."""

    @needs_native
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("upsample", [False, True])
    def test_has_the_bits_of_prepared_weights(self, dtype, upsample):
        x, weight, bias = make(2, 32, 48, 9, 16, dtype)

        def prepared():
            return prepare_conv3x3(weight, dtype, size=None if upsample else (9, 16))

        expected = conv3x3(x, weight, bias, upsample=upsample, prepared=prepared())
        for _ in range(2):
            assert torch.equal(conv3x3_cached(x, weight, bias, upsample=upsample), expected)
        small = x[:, :, :4, :4]
        expected_small = conv3x3(small, weight, bias, upsample=upsample, prepared=prepare_conv3x3(weight, dtype))
        assert torch.equal(conv3x3_cached(small, weight, bias, upsample=upsample), expected_small)
        weight.mul_(2)
        expected = conv3x3(x, weight, bias, upsample=upsample, prepared=prepared())
        assert torch.equal(conv3x3_cached(x, weight, bias, upsample=upsample), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_that_nobody_prepares_are_converted(self, dtype, monkeypatch):
        monkeypatch.delenv("DDIM_FAST_BACKEND")
        x, weight, bias = make(2, 3, 5, 4, 6)
        residual = torch.randn(2, 5, 4, 6).to(dtype)
        result = conv3x3_cached(x.to(dtype), weight, bias, residual=residual)
        assert result.dtype == dtype
        torch.testing.assert_close(result, conv3x3_reference(x.to(dtype), weight.to(dtype), bias, residual=residual))

    def test_gradients_are_pytorchs(self, monkeypatch):
        monkeypatch.delenv("DDIM_FAST_BACKEND")
        gradients = []
        for function in (conv3x3_cached, conv3x3_reference):
            x, weight, bias = (t.requires_grad_() for t in make(*SHAPES[0]))
            function(x, weight, bias).square().sum().backward()
            gradients.append((x.grad, weight.grad, bias.grad))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    @needs_native
    def test_compiles_without_a_break_and_is_a_proper_operator(self):
        x, weight, bias = make(*SHAPES[1])
        residual = torch.randn(3, 48, 7, 5).to(memory_format=torch.channels_last)
        torch.library.opcheck(torch.ops.ddim_fast.conv3x3_cached.default, (x, weight, bias, residual, False))
        torch.library.opcheck(torch.ops.ddim_fast.conv3x3_cached.default, (x, weight, None, None, True))
        compiled = torch.compile(conv3x3_cached, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight, bias, residual=residual), conv3x3_cached(x, weight, bias, residual=residual))
        weight.mul_(2)
        assert torch.equal(compiled(x, weight, bias, residual=residual), conv3x3_cached(x, weight, bias, residual=residual))


@pytest.mark.parametrize("upsample", [False, True])
def test_of_signals_it_is_along_the_width(monkeypatch, upsample):
    monkeypatch.delenv("DDIM_FAST_BACKEND")
    x, weight, bias = make(2, 16, 32, 1, 12)
    weight, wide = weight[:, :, :1], x[:, :, 0].repeat_interleave(2, dim=2) if upsample else x[:, :, 0]
    residual = torch.randn(2, 32, 1, wide.shape[2])
    assert prepare_conv3x3(weight, torch.float32) is None
    expected = F.conv1d(wide, weight[:, :, 0], bias, padding=1) + residual[:, :, 0]
    result = conv3x3(x, weight, bias, residual=residual, upsample=upsample)
    torch.testing.assert_close(result[:, :, 0], expected, atol=1e-5, rtol=1e-5)


@needs_native
def test_the_native_one_says_that_it_has_none_for_signals():
    with pytest.raises(ValueError, match="it takes 3x3 weights, not 1x3"):
        prepare_conv3x3(torch.zeros(16, 16, 1, 3), torch.float32)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rows", [1, 2])
def test_enlarging_by_a_copy_is_interpolation(rows, layout, compiled):
    x = torch.randn(2, 3, 5, 4).contiguous(memory_format=layout).requires_grad_()
    larger = (torch.compile(_copied_larger, fullgraph=True) if compiled else _copied_larger)(x, rows)
    assert larger.is_contiguous(memory_format=torch.channels_last)
    exact = F.interpolate(x, scale_factor=(float(rows), 2.0), mode="nearest")
    assert torch.equal(larger, exact)
    weights = torch.randn_like(larger)
    gradients = (torch.autograd.grad((image * weights).sum(), x)[0] for image in (larger, exact))
    torch.testing.assert_close(*gradients)
