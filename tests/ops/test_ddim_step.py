import math
import re

import numpy as np
import pytest
import torch

from ddim_fast import coefficient_table, ddim_step, fast_ddim_step, seeded_noise
from ddim_fast.diffusion.step import step_coefficients
from ddim_fast.ops import native
from ddim_fast.ops.ddim_step import _registered, ddim_step_reference
from tests.helpers.pairs import every_pair

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


@every_pair(
    dtype=[torch.float32, torch.float64, torch.bfloat16, torch.float16], prediction_type=TYPES, eta=ETAS, clip=[None, 1.0]
)
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


def assert_same_bits(actual, expected, backend):
    """Equal to the last bit; in the interpreter but for the last of a bfloat16, which it cuts off where GPUs round."""
    assert actual.dtype == expected.dtype
    last_bit = torch.finfo(torch.bfloat16).eps if backend.interpreted and actual.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(actual, expected, rtol=last_bit, atol=0, equal_nan=True)


def served(backend, dtype):
    """Whether the implementation takes this dtype."""
    return dtype != torch.float16 or backend.name != "native"


@every_pair(prediction_type=TYPES, eta=[0.0, 0.5, "sigma-hat"], clip=[None, 1.0], shape=[(3, 2, 5, 7), (4, 3, 64, 64)])
def test_every_implementation_equals_the_reference_bit_for_bit(backend, shape, prediction_type, eta, clip):
    tensors = [t.to(backend.device) for t in make_inputs(shape)]
    sample, output, noise = tensors
    noise = noise if eta else None
    expected = ddim_step_reference(sample, output, step_coefficients(A, B, eta, prediction_type), clip, noise)
    options = {"eta": eta, "noise": noise, "prediction_type": prediction_type, "clip_sample_range": clip}
    assert_same_bits(fast_ddim_step(sample, output, A, B, **options), expected, backend)


@pytest.mark.parametrize("sample_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sample_output_and_result_may_each_have_a_dtype(backend, sample_dtype, output_dtype, out_dtype):
    if not all(served(backend, dtype) for dtype in (sample_dtype, output_dtype, out_dtype)):
        pytest.skip("float16 is for GPUs")
    sample, output, noise = (t.to(backend.device) for t in make_inputs((1, 1037)))
    unconditional = output.flip(1)
    sample, noise, output, unconditional = (
        *(t.to(sample_dtype) for t in (sample, noise)),
        *(t.to(output_dtype) for t in (output, unconditional)),
    )
    coefficients = step_coefficients(A, B, 0.5)
    options = {"unconditional": unconditional, "guidance": 2.5, "out_dtype": out_dtype}
    expected = ddim_step_reference(sample, output, coefficients, 1.0, noise, **options)
    assert_same_bits(ddim_step(sample, output, coefficients, 1.0, noise, **options), expected, backend)
    # The same written into a tensor that is given, and into none of its neighbours.
    buffer = torch.full((output.numel() + 2,), 7.0, dtype=out_dtype, device=backend.device)
    out = buffer[1:-1].view(output.shape)
    del options["out_dtype"]
    assert ddim_step(sample, output, coefficients, 1.0, noise, out, **options) is out
    assert_same_bits(out, expected, backend)
    assert buffer[0] == buffer[-1] == 7


@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.5, -1.0])
def test_guidance_is_the_step_with_both_outputs_combined(backend, guidance):
    sample, output, unconditional = (t.to(backend.device) for t in make_inputs())
    actual = fast_ddim_step(sample, output, A, B, unconditional_output=unconditional, guidance=guidance)
    combined = unconditional.double() + guidance * (output.double() - unconditional.double())
    torch.testing.assert_close(actual.double(), formula(sample, combined), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape,step", [((3, 2, 5, 7), 0), ((3, 1, 3), 1), ((2, 3, 32, 32), 16), ((4, 1), 2**31), ((3,), 1), ((2, 3, 32, 32), 2**31)]
)
def test_noise_from_seeds_is_that_of_seeded_noise(backend, shape, step):
    sample, output, _ = (t.to(backend.device) for t in make_inputs(shape))
    seeds = [5, 0, 2**63 - 1, 2**40 + 3][: shape[0]]
    noise = seeded_noise(seeds, step, shape[1:], backend.device)
    options = {"eta": 1.0, "clip_sample_range": 1.0}
    expected = fast_ddim_step(sample, output, A, B, noise=noise, **options)
    for form in (seeds, torch.tensor(seeds, device=backend.device)):
        actual = fast_ddim_step(sample, output, A, B, seeds=form, step=step, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    # An image's noise is its own, whatever the batch.
    alone = fast_ddim_step(sample[1:2], output[1:2], A, B, seeds=seeds[1:2], step=step, **options)
    assert torch.equal(alone, actual[1:2])


def test_seeds_are_not_read_at_eta_zero():
    sample, output, _ = make_inputs()
    assert torch.equal(fast_ddim_step(sample, output, A, B, seeds=[1]), fast_ddim_step(sample, output, A, B))


@pytest.mark.parametrize("with_seeds", [False, True])
def test_a_table_and_an_index_give_every_step(backend, with_seeds):
    levels = [0.05, 0.2, 0.6, 1.0]
    table = coefficient_table(levels, 0.5, "v_prediction")
    assert table.shape == (3, 7) and table.dtype.name == "float32"
    sample, output, _ = (t.to(backend.device) for t in make_inputs())
    seeds = torch.tensor([3, 2, 1], device=backend.device) if with_seeds else None
    index = torch.zeros((), dtype=torch.int64, device=backend.device)
    for i, row in enumerate(table):
        actual = ddim_step(sample, output, torch.from_numpy(table).to(backend.device), 1.0, seeds=seeds, step=index)
        assert_same_bits(actual, ddim_step(sample, output, row.tolist(), 1.0, seeds=seeds, step=i), backend)
        index += 1


def test_a_step_outside_the_table_is_an_error_or_nan(backend):
    sample, output, _ = (t.to(backend.device) for t in make_inputs())
    table = torch.ones(4, 7, device=backend.device)
    for index in (-1, 4, 2**40):
        step = torch.tensor([index], device=backend.device)
        if backend.device == "cpu":
            with pytest.raises(ValueError, match=f"step is {index}, but the table of coefficients has rows 0 to 3"):
                ddim_step(sample, output, table, step=step)
        else:
            assert ddim_step(sample, output, table, step=step).isnan().all()
            assert ddim_step_reference(sample, output, table, step=step).isnan().all()


@pytest.mark.parametrize("which", ["sample", "model_output", "noise", "unconditional"])
def test_out_may_be_any_input(backend, which):
    values = (*make_inputs(), make_inputs()[0].flip(0))
    names = ("sample", "model_output", "noise", "unconditional")
    tensors = {name: t.to(backend.device) for name, t in zip(names, values, strict=True)}
    coefficients = step_coefficients(A, B, 0.5)
    expected = ddim_step_reference(**tensors, coefficients=coefficients, clip=1.0, guidance=2.0)
    ddim_step(**tensors, coefficients=coefficients, clip=1.0, guidance=2.0, out=tensors[which])
    assert_same_bits(tensors[which], expected, backend)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_nan_stays_nan_and_where_it_was(backend, clip):
    tensors = [t.to(backend.device) for t in make_inputs((1, 1000))]
    for which in range(3):
        poisoned = [t.clone() for t in tensors]
        poisoned[which][0, [0, 500, 999]] = math.nan
        out = fast_ddim_step(*poisoned[:2], A, B, eta=1.0, noise=poisoned[2], clip_sample_range=clip)
        assert out.isnan().nonzero()[:, 1].tolist() == [0, 500, 999]


def test_dense_tensors_of_any_order_are_served(backend):
    tensors = [t.to(backend.device).to(memory_format=torch.channels_last) for t in make_inputs((2, 4, 6, 6))]
    actual = fast_ddim_step(*tensors[:2], A, B, eta=1.0, noise=tensors[2])
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual.double(), formula(*tensors[:2], eta=1.0, noise=tensors[2]), rtol=2e-6, atol=2e-6)
    # Of one channel, contiguous and channels_last are the same memory.
    image = tensors[0][:, :1].contiguous()
    fast_ddim_step(image, image.as_strided(image.shape, (36, 1, 6, 1)), A, B)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [pytest.param(b, marks=pytest.mark.gpu) for b in ("triton", "cuda")], indirect=True)
def test_one_captured_graph_serves_every_step(backend):
    levels = [0.05, 0.2, 0.6, 1.0]
    table = torch.from_numpy(coefficient_table(levels, 1.0)).to("cuda")
    start, output, _ = (t.to("cuda") for t in make_inputs((4, 3, 32, 32)))
    seeds = torch.arange(4, device="cuda")
    expected = start
    for i in range(3):
        expected = ddim_step(expected, output, table, 1.0, seeds=seeds, step=torch.tensor(i, device="cuda"))

    x, index = start.clone(), torch.zeros((), dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ddim_step(x, output, table, 1.0, out=x, seeds=seeds, step=index)
        index += 1
    x.copy_(start)
    index.zero_()
    for _ in range(3):
        graph.replay()
    assert torch.equal(x, expected)


WHY_NOT_CUDA = native.why_not or (
    "it takes float32 and bfloat16 and float16 on a cuda device, not torch.float32 on cpu"
    if native.has_cuda
    else "ddim_fast was built without nvcc"
)


@pytest.mark.parametrize(
    "forced,message",
    [
        ("cuda", "DDIM_FAST_BACKEND=cuda cannot serve ddim_step: " + WHY_NOT_CUDA),
        ("fastest", "DDIM_FAST_BACKEND='fastest' is unknown; choose reference, native, triton, cuda"),
    ],
    ids=["cuda", "fastest"],
)
def test_a_forced_backend_that_cannot_serve_says_why(forced, message, monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", forced)
    with pytest.raises(ValueError, match=re.escape(message)):
        fast_ddim_step(*make_inputs()[:2], A, B)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("DDIM_FAST_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton cannot serve ddim_step: it needs a GPU, and the tensors are on cpu"):
        fast_ddim_step(*make_inputs()[:2], A, B)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda x, y: (x.double(), y.double(), A), "float64"),
        (lambda x, y: (x, y.to(memory_format=torch.channels_last), A), "dense tensors of one memory layout"),
        (lambda x, y: (x[..., ::2], y[..., ::2], A), "dense tensors of one memory layout"),
        (lambda x, y: (x, y.requires_grad_(), A), "records no gradient"),
        (lambda x, y: (x, y, torch.full((3,), A)), "noise levels as numbers"),
    ],
)
def test_kernels_say_what_they_cannot_serve(backend, change, message, monkeypatch):
    sample, output, a = change(*(t.to(backend.device) for t in make_inputs()[:2]))
    with pytest.raises(ValueError, match=f"DDIM_FAST_BACKEND={backend.name} cannot serve ddim_step: .*{message}"):
        fast_ddim_step(sample, output, a, B)
    monkeypatch.delenv("DDIM_FAST_BACKEND")
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
        ({"out": X.int()}, "out must be a floating-point tensor; got torch.int32"),
        ({"out": X, "out_dtype": torch.float64}, "out_dtype must be a floating-point dtype, that of out .*got torch.float64"),
        ({"out_dtype": torch.int32}, "out_dtype must be a floating-point dtype.*got torch.int32"),
        ({"unconditional_output": X}, "guidance and the unconditional output belong together"),
        ({"guidance": 2.0}, "guidance and the unconditional output belong together"),
        ({"unconditional_output": X, "guidance": math.inf}, "guidance must be a finite number; got inf"),
        ({"unconditional_output": X[:1], "guidance": 2.0}, "unconditional has shape"),
        ({"eta": 1.0, "seeds": [1, 2], "noise": X}, "seeds make the noise; give them or noise, not both"),
        ({"eta": 1.0, "seeds": [1]}, r"seeds must be int64, one an image of .*\(2, 3, 4, 4\); got torch.int64 of shape \(1,\)"),
        ({"eta": 1.0, "seeds": torch.zeros(2)}, "seeds must be int64.*got torch.float32"),
        ({"eta": 1.0, "seeds": torch.zeros(2, dtype=torch.int64, device="meta")}, "seeds is on meta"),
        ({"eta": 1.0, "seeds": [1, -1]}, "a seed is a whole number from 0 to 2.*got -1"),
        ({"eta": 1.0, "seeds": [1, 1.5]}, "a seed is a whole number from 0 to 2.*got 1.5"),
        ({"model_output": X.to("meta")}, "model_output is on meta, but sample is on cpu"),
        ({"noise": X.to("meta"), "eta": 1.0}, "noise is on meta"),
        ({"out": X.to("meta")}, "out is on meta"),
        ({"eta": 0.5}, "eta = 0.5 needs noise or seeds"),
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


SEVEN = [float(c) for c in step_coefficients(A, B, 0.5)]
TABLE = torch.ones(3, 7)
INDEX = torch.tensor(0)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"coefficients": SEVEN[:6]}, "coefficients has 6 values instead of 7"),
        ({"coefficients": TABLE[0], "step": INDEX}, r"table of coefficients is float32 of shape \(S, 7\); got .*\(7,\)"),
        ({"coefficients": TABLE.double(), "step": INDEX}, "table of coefficients is float32"),
        ({"coefficients": TABLE}, "step must be an int64 tensor of one element"),
        ({"coefficients": TABLE, "step": torch.zeros(2, dtype=torch.int64)}, "step must be an int64 tensor of one element"),
        ({"coefficients": TABLE, "step": INDEX.int()}, "step must be an int64 tensor of one element"),
        ({"coefficients": TABLE.to("meta"), "step": INDEX}, "coefficients is on meta"),
        ({"step": INDEX}, "step is a tensor only where coefficients is a table"),
        ({"clip": 0.0}, "clip must be positive, or None; got 0.0"),
    ],
)
def test_bad_arguments_of_the_operator_are_named(changes, message):
    arguments = {"sample": X, "model_output": X, "coefficients": SEVEN, **changes}
    with pytest.raises(ValueError, match=message):
        ddim_step(**arguments)


def operator_arguments(table=False, dtype=torch.float32, shape=(2, 3, 4, 4), grad=False):
    """Arguments of the registered operator with everything in use, noise given or drawn."""
    sample, output, noise, unconditional = (
        t.requires_grad_(grad) for t in (*make_inputs(shape, dtype), make_inputs(shape, dtype)[0].flip(0))
    )
    seven, index = ([], INDEX) if table else (SEVEN, None)
    rows = torch.tensor([SEVEN]) if table else None
    return sample, output, seven, rows, 1.0, noise, unconditional, 2.0, None, 0, index, dtype


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_registered_operator_passes_opcheck(table, grad, monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", "reference")
    torch.library.opcheck(_registered, operator_arguments(table, grad=grad))
    sample, output, _ = make_inputs((2, 3, 4, 4))
    seeds = torch.tensor([1, 2])
    torch.library.opcheck(_registered, (sample, output, SEVEN, None, None, None, None, None, seeds, 3, None, torch.bfloat16))


@pytest.mark.parametrize("table", [False, True])
def test_gradients_of_the_registered_operator(table):
    sample, output, seven, rows, clip, noise, unconditional, *rest = operator_arguments(
        table, torch.float64, (2, 1, 2, 2), True
    )

    def step(sample, output, noise, unconditional):
        return _registered(sample, output, seven, rows, clip, noise, unconditional, *rest)

    assert torch.autograd.gradcheck(step, (sample, output, noise, unconditional))


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_code_draws_noise_without_a_graph_break(grad):
    sample, output, _ = make_inputs()
    seeds = torch.tensor([4, 5, 6])

    def step(sample, output):
        return fast_ddim_step(sample, output, A, B, eta=1.0, seeds=seeds, step=2, clip_sample_range=1.0) + 1

    expected = step(sample, output)
    output.requires_grad_(grad)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(sample, output)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    if grad:
        actual.sum().backward()
        assert output.grad.isfinite().all() and output.grad.any()


def test_an_export_holds_pytorchs_own_operators_only():
    model = torch.nn.Module()
    model.forward = lambda x, y, seeds: fast_ddim_step(x, y, A, B, eta=1.0, seeds=seeds, step=1)
    graph = torch.export.export(model, (*make_inputs()[:2], torch.tensor([1, 2, 3]))).graph
    assert not [node for node in graph.nodes if "ddim_fast" in str(node.target)]


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([0.5, 0.0], [0.9, 0.9], {}, "at zero SNR"),
        ([0.5, 1e-90], 0.9, {}, "at zero SNR"),
        (1e-90, 0.9, {}, "at zero SNR"),
        (0.9, [0.5, 1.1], {}, r"must lie in \[0, 1\]"),
        ([0.5, float("nan")], 0.9, {}, r"must lie in \[0, 1\]"),
        ([0.5, 1.0], [0.6, 1.0], {"prediction_type": "sample"}, "without noise"),
        ([0.5, 0.9], [0.6, 0.8], {"eta": 1.0}, "a stochastic step must lead to less noise"),
    ],
)
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_levels_that_determine_no_step_are_named(library, a, b, options, message):
    make = torch.tensor if library == "torch" else np.array
    x, output = make([[0.1, 0.2], [0.3, 0.4]]), make([[0.5, 0.6], [0.7, 0.8]])
    a, b = (make(level) if isinstance(level, list) else level for level in (a, b))
    with pytest.raises(ValueError, match=message):
        fast_ddim_step(x, output, a, b, noise=output if "eta" in options else None, **options)


def test_a_result_that_lies_across_an_input_is_the_same_as_beside_it():
    coefficients = [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.0]
    memory = torch.randn(4097)
    sample, out, model_output = memory[:-1], memory[1:], torch.randn(4096)
    expected = ddim_step(sample.clone(), model_output, coefficients)
    assert torch.equal(ddim_step(sample, model_output, coefficients, out=out), expected)


def test_numbers_that_lie_in_memory_with_the_other_sign_are_read_with_their_own():
    coefficients = [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.0]
    plain, other = torch.randn(64), torch.randn(64)
    turned = torch.complex(torch.zeros(64), -plain).conj().imag
    assert turned.is_neg() and torch.equal(turned, plain)
    assert torch.equal(ddim_step(turned, other, coefficients), ddim_step(plain, other, coefficients))


@pytest.mark.parametrize("out", [torch.zeros(1).expand(4), torch.zeros(4, requires_grad=True)])
def test_a_result_that_cannot_be_written_is_named(out):
    with pytest.raises(ValueError, match=r"ddim_step: out .*(has one place for several numbers|records a gradient)"):
        ddim_step(torch.zeros(4), torch.zeros(4), [1.0] * 7, out=out)
