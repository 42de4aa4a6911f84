import math
import re

import pytest
import torch

from ddim_fast import fast_ddim_step
from ddim_fast.diffusion.step import step_coefficients
from ddim_fast.ops import native
from ddim_fast.ops.ddim_step import ddim_step_reference

A, B = 0.23, 0.61
TYPES = ["epsilon", "v_prediction", "sample"]
ETAS = [0.0, 0.5, 1.0, "sigma-hat"]


def make_inputs(shape=(3, 2, 5, 7), dtype=torch.float32):
    """sample, model_output and noise."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))


def formula(sample, output, a=A, b=B, *, eta=0.0, noise=None, prediction_type="epsilon", clip=None):
    """Song et al. 2021, eq. 12 and 16, in float64."""
    x, output = sample.double(), output.double()
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    a, b = (v.reshape(-1, *[1] * (x.ndim - 1)) if v.ndim else v for v in (a, b))
    if prediction_type == "epsilon":
        eps, x0 = output, (x - (1 - a).sqrt() * output) / a.sqrt()
    elif prediction_type == "v_prediction":
        eps, x0 = a.sqrt() * output + (1 - a).sqrt() * x, a.sqrt() * x - (1 - a).sqrt() * output
    else:
        eps, x0 = (x - a.sqrt() * output) / (1 - a).sqrt(), output
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    share = 1.0 if eta == "sigma-hat" else eta
    sigma = share * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    direction = (1 - b - sigma**2).sqrt() * eps
    if eta == "sigma-hat":
        sigma = (1 - a / b).sqrt()
    return b.sqrt() * x0 + direction + (sigma * noise.double() if noise is not None else 0)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_the_formula(dtype, prediction_type, eta, clip):
    sample, output, noise = make_inputs(dtype=dtype)
    noise = noise if eta else None
    options = {"eta": eta, "noise": noise, "prediction_type": prediction_type}
    actual = fast_ddim_step(sample, output, A, B, clip_sample_range=clip, **options)
    assert actual.dtype == dtype
    # Arithmetic is in float32, so a narrow dtype costs one rounding, half of its eps, and no more.
    rounding = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 0.51 * torch.finfo(dtype).eps)
    slack = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(actual.double(), formula(sample, output, clip=clip, **options), rtol=rounding, atol=slack)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_noise_levels_may_be_numbers_or_tensors(prediction_type, eta):
    sample, output, noise = make_inputs()
    options = {"eta": eta, "noise": noise, "prediction_type": prediction_type}
    expected = fast_ddim_step(sample, output, A, B, **options)
    for convert in (
        lambda v: torch.tensor(v, dtype=torch.float64),
        lambda v: torch.tensor([v], dtype=torch.float64),
        lambda v: torch.full((3,), v, dtype=torch.float64),
    ):
        torch.testing.assert_close(
            fast_ddim_step(sample, output, convert(A), convert(B), **options), expected, rtol=2e-6, atol=2e-6
        )
    mixed = fast_ddim_step(sample, output, torch.full((3,), A, dtype=torch.float64), B, **options)
    torch.testing.assert_close(mixed, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_each_image_may_have_its_own_noise_levels(eta):
    sample, output, noise = make_inputs()
    a, b = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.5, 1.0])
    actual = fast_ddim_step(sample, output, a, b, eta=eta, noise=noise)
    torch.testing.assert_close(actual.double(), formula(sample, output, a, b, eta=eta, noise=noise), rtol=1e-5, atol=1e-5)
    for i in range(3):
        alone = fast_ddim_step(sample[i : i + 1], output[i : i + 1], float(a[i]), float(b[i]), eta=eta, noise=noise[i : i + 1])
        torch.testing.assert_close(actual[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 4, 3), (2, 3, 4, 5, 6)])
def test_any_shape_is_served(shape):
    sample, output, _ = make_inputs(shape)
    actual = fast_ddim_step(sample, output, A, B)
    assert actual.shape == shape
    torch.testing.assert_close(actual.double(), formula(sample, output), rtol=2e-6, atol=2e-6)


def test_an_empty_batch_is_no_error():
    empty = torch.empty(0, 3, 8, 8)
    assert fast_ddim_step(empty, empty, A, B, eta=1.0, noise=empty).shape == (0, 3, 8, 8)
    assert fast_ddim_step(empty, empty, torch.empty(0), B).shape == (0, 3, 8, 8)


def test_the_memory_layout_does_not_matter():
    tensors = make_inputs((2, 4, 6, 6))
    expected = fast_ddim_step(*tensors[:2], A, B, eta=1.0, noise=tensors[2])
    channels_last = [t.to(memory_format=torch.channels_last) for t in tensors]
    actual = fast_ddim_step(*channels_last[:2], A, B, eta=1.0, noise=channels_last[2])
    assert torch.equal(actual, expected) and actual.is_contiguous(memory_format=torch.channels_last)
    for i in range(3):
        mixed = [channels_last[j] if i == j else t for j, t in enumerate(tensors)]
        assert torch.equal(fast_ddim_step(*mixed[:2], A, B, eta=1.0, noise=mixed[2]), expected)


def test_slices_and_broadcasts_are_served():
    sample, output, _ = make_inputs((4, 3, 8, 8))
    expected = formula(sample[:, :, ::2, 1:], output[:, :, ::2, 1:])
    actual = fast_ddim_step(sample[:, :, ::2, 1:], output[:, :, ::2, 1:], A, B)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)
    broadcast = sample[:1].expand(4, -1, -1, -1)
    torch.testing.assert_close(
        fast_ddim_step(broadcast, output, A, B).double(), formula(broadcast, output), rtol=2e-6, atol=2e-6
    )


def test_a_narrow_network_serves_a_float32_sample():
    sample, output, _ = make_inputs()
    output = output.bfloat16()
    actual = fast_ddim_step(sample, output, A, B)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), formula(sample, output), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("target", ["new", "sample", "model_output", "noise", "sliced"])
def test_out_is_filled_and_returned(target, dtype):
    sample, output, noise = make_inputs(dtype=dtype)
    expected = fast_ddim_step(sample, output, A, B, eta=1.0, noise=noise, clip_sample_range=1.0)
    out = {
        "new": torch.full_like(sample, float("nan")),
        "sample": sample,
        "model_output": output,
        "noise": noise,
        "sliced": torch.full((*sample.shape, 2), float("nan"), dtype=dtype)[..., 0],
    }[target]
    returned = fast_ddim_step(sample, output, A, B, eta=1.0, noise=noise, clip_sample_range=1.0, out=out)
    assert returned is out
    assert torch.equal(out, expected)


def test_inputs_stay_as_they_are_and_noise_is_not_read_at_eta_zero():
    tensors = make_inputs()
    copies = [t.clone() for t in tensors]
    expected = fast_ddim_step(tensors[0], tensors[1], A, B)
    poisoned = torch.full_like(tensors[0], float("nan"))
    assert torch.equal(fast_ddim_step(tensors[0], tensors[1], A, B, noise=poisoned), expected)
    fast_ddim_step(tensors[0], tensors[1], A, B, eta=1.0, noise=tensors[2], clip_sample_range=0.1)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


def test_clipping_leaves_epsilon_as_predicted():
    sample, output, _ = make_inputs()
    clipped = fast_ddim_step(sample, output, A, B, clip_sample_range=1e-6)
    torch.testing.assert_close(clipped, math.sqrt(1 - B) * output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("levels", ["numbers", "tensors"])
def test_gradients_are_those_of_the_formula(levels, prediction_type):
    tensors = [t.requires_grad_() for t in make_inputs((2, 1, 2, 2), torch.float64)]
    a, b = (A, B) if levels == "numbers" else (torch.tensor([0.2, 0.4]), torch.tensor([0.5, 0.9]))

    def step(sample, output, noise):
        return fast_ddim_step(sample, output, a, b, eta=0.5, noise=noise, prediction_type=prediction_type)

    assert torch.autograd.gradcheck(step, tensors)


def test_float32_records_gradients_too():
    sample, output, _ = make_inputs()
    output.requires_grad_()
    fast_ddim_step(sample, output, A, B).sum().backward()
    c = step_coefficients(A, B)
    expected = c.prev_from_x0 * c.x0_from_output + c.prev_from_eps
    torch.testing.assert_close(output.grad, torch.full_like(output, expected), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(native.module is None, reason=str(native.why_not))
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, "sigma-hat"])
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (4, 3, 64, 64)])
def test_native_equals_the_reference_bit_for_bit(shape, prediction_type, eta, clip, monkeypatch):
    sample, output, noise = make_inputs(shape)
    noise = noise if eta else None
    expected = ddim_step_reference(sample, output, step_coefficients(A, B, eta, prediction_type), clip, noise)
    monkeypatch.setenv("DDIM_FAST_BACKEND", "native")
    options = {"eta": eta, "noise": noise, "prediction_type": prediction_type, "clip_sample_range": clip}
    assert torch.equal(fast_ddim_step(sample, output, A, B, **options), expected)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_backend_can_be_forced(backend, monkeypatch):
    if backend == "native" and native.module is None:
        pytest.skip(native.why_not)
    sample, output, _ = make_inputs()
    monkeypatch.setenv("DDIM_FAST_BACKEND", backend)
    actual = fast_ddim_step(sample, output, A, B)
    torch.testing.assert_close(actual.double(), formula(sample, output), rtol=2e-6, atol=2e-6)


WHY_NOT_CUDA = native.why_not or (
    "it takes float32 on a GPU, not torch.float32 on cpu" if native.has_cuda else "ddim_fast was built without nvcc"
)


@pytest.mark.parametrize(
    "backend,message",
    [
        ("triton", "DDIM_FAST_BACKEND=triton cannot serve ddim_step: it needs a GPU, and the sample is on cpu"),
        ("cuda", "DDIM_FAST_BACKEND=cuda cannot serve ddim_step: " + WHY_NOT_CUDA),
        ("fastest", "DDIM_FAST_BACKEND='fastest' is unknown; choose reference, native, triton, cuda"),
    ],
    ids=["triton", "cuda", "fastest"],
)
def test_a_forced_backend_that_cannot_serve_says_why(backend, message, monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", backend)
    with pytest.raises(ValueError, match=re.escape(message)):
        fast_ddim_step(*make_inputs()[:2], A, B)


@pytest.mark.skipif(native.module is None, reason=str(native.why_not))
@pytest.mark.parametrize(
    "change,message",
    [
        (lambda x, y: (x.double(), y.double(), A), "float32 on the CPU, not torch.float64 on cpu"),
        (lambda x, y: (x, y.bfloat16(), A), "tensors of one dtype"),
        (lambda x, y: (x, y.to(memory_format=torch.channels_last), A), "dense tensors of one memory layout"),
        (lambda x, y: (x[..., ::2], y[..., ::2], A), "dense tensors of one memory layout"),
        (lambda x, y: (x, y.requires_grad_(), A), "records no gradient"),
        (lambda x, y: (x, y, torch.full((3,), A)), "noise levels as numbers"),
    ],
)
def test_native_says_what_it_cannot_serve(change, message, monkeypatch):
    sample, output, a = change(*make_inputs()[:2])
    fast_ddim_step(sample, output, a, B)
    monkeypatch.setenv("DDIM_FAST_BACKEND", "native")
    with pytest.raises(ValueError, match=f"DDIM_FAST_BACKEND=native cannot serve ddim_step: .*{message}"):
        fast_ddim_step(sample, output, a, B)


X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model_output": X[:1]}, r"model_output has shape \(1, 3, 4, 4\), but sample has \(2, 3, 4, 4\)"),
        ({"noise": X[0], "eta": 1.0}, "noise has shape"),
        ({"out": X[:, :1]}, "out has shape"),
        ({"sample": X.int()}, "sample must be a floating-point tensor; got torch.int32"),
        ({"sample": X + 0j}, "sample must be a floating-point tensor; got torch.complex64"),
        ({"model_output": X.bool()}, "model_output must be a floating-point tensor; got torch.bool"),
        ({"noise": X.long(), "eta": 1.0}, "noise must be a floating-point tensor; got torch.int64"),
        ({"out": X.double()}, "out is torch.float64, but sample is torch.float32"),
        ({"model_output": X.to("meta")}, "model_output is on meta, but sample is on cpu"),
        ({"noise": X.to("meta"), "eta": 1.0}, "noise is on meta"),
        ({"out": X.to("meta")}, "out is on meta"),
        ({"eta": 0.5}, "eta = 0.5 needs noise"),
        ({"eta": "sigma-hat"}, "eta = sigma-hat needs noise"),
        ({"eta": -0.1, "noise": X}, "eta must lie in .*got -0.1"),
        ({"eta": 1.1, "noise": X}, "eta must lie in .*got 1.1"),
        ({"eta": float("nan"), "noise": X}, "eta must lie in .*got nan"),
        ({"eta": "ddpm", "noise": X}, "eta must lie in .*got 'ddpm'"),
        ({"clip_sample_range": -1.0}, "clip_sample_range must be positive, or None; got -1.0"),
        ({"clip_sample_range": 0}, "clip_sample_range must be positive, or None; got 0"),
        ({"clip_sample_range": float("nan")}, "clip_sample_range must be positive, or None; got nan"),
        ({"prediction_type": "flow"}, "prediction_type must be epsilon, v_prediction or sample; got 'flow'"),
        ({"alphas_cumprod_t": -0.1}, r"alphas_cumprod_t must lie in \[0, 1\]; got -0.1"),
        ({"alphas_cumprod_prev": 2}, r"alphas_cumprod_prev must lie in \[0, 1\]; got 2.0"),
        ({"alphas_cumprod_t": torch.tensor(1.5)}, r"alphas_cumprod_t must lie in \[0, 1\]; got 1.5"),
        ({"alphas_cumprod_t": float("nan")}, "alphas_cumprod_t must lie in .*got nan"),
        ({"alphas_cumprod_t": 0}, "at zero SNR"),
        ({"alphas_cumprod_t": torch.ones(3)}, r"one number or one an image; got shape \(3,\) for .*\(2, 3, 4, 4\)"),
        ({"alphas_cumprod_prev": torch.ones(2, 1)}, r"one number or one an image; got shape \(2, 1\)"),
        ({"alphas_cumprod_t": 0.9, "eta": 1.0, "noise": X}, "a stochastic step must lead to less noise"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"sample": X, "model_output": X, "alphas_cumprod_t": A, "alphas_cumprod_prev": B, **changes}
    with pytest.raises(ValueError, match=message):
        fast_ddim_step(**arguments)


@pytest.mark.parametrize("levels", [(A, B), (torch.tensor(A), torch.tensor(B)), (torch.full((3,), A), torch.full((3,), B))])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_compiles_without_graph_breaks(eta, levels):
    sample, output, noise = make_inputs()

    def step(sample, output, a, b, noise):
        return fast_ddim_step(sample, output, a, b, eta=eta, noise=noise, clip_sample_range=1.0) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    actual = compiled(sample, output, *levels, noise)
    expected = formula(sample, output, eta=eta, noise=noise if eta else None, clip=1.0) + 1
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)


def test_compiled_code_may_write_in_place():
    sample, output, _ = make_inputs()
    expected = formula(sample, output)
    torch.compile(lambda x, y: fast_ddim_step(x, y, A, B, out=x), fullgraph=True)(sample, output)
    torch.testing.assert_close(sample.double(), expected, rtol=2e-6, atol=2e-6)
