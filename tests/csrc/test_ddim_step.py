"""ddim_fast._native.ddim_step against numpy: the same operations in the same order must give the same bits."""

import numpy as np
import pytest
import torch

from ddim_fast import seeded_noise
from ddim_fast.ops import native
from tests.helpers.pairs import every_pair

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.why_not))

COEFFICIENTS = (1.25, -0.75, 0.3, 1.1, 0.9, 0.43, 0.2)
INF = float("inf")


def make_inputs(numel: int) -> tuple[np.ndarray, ...]:
    """sample, model_output and noise."""
    generator = np.random.default_rng(numel)
    return tuple(generator.standard_normal(numel, dtype=np.float32) for _ in range(3))


def reference(sample, model_output, noise=None, clip=INF):
    p, q, r, s, u, v, sigma = np.float32(COEFFICIENTS)
    x0 = np.clip(p * sample + q * model_output, np.float32(-clip), np.float32(clip))
    out = u * x0 + v * (r * sample + s * model_output)
    return out if noise is None else out + sigma * noise


def native_step(sample, model_output, noise=None, clip=INF, out=None, num_threads=1):
    out = np.full_like(sample, np.nan) if out is None else out
    noise_pointer = 0 if noise is None else noise.ctypes.data
    native.module.ddim_step(
        sample.ctypes.data,
        model_output.ctypes.data,
        noise_pointer,
        out.ctypes.data,
        sample.size,
        COEFFICIENTS,
        clip,
        num_threads,
    )
    return out


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


# The last size is more than three grains of work, so three threads take part.
@every_pair(numel=[0, 1, 15, 17, 1023, 300_001, 2_000_003], num_threads=[1, 2, 3], clip=[INF, 1.0], with_noise=[False, True])
def test_same_bits_as_numpy(numel, clip, with_noise, num_threads):
    sample, model_output, noise = make_inputs(numel)
    noise = noise if with_noise else None
    actual = native_step(sample, model_output, noise, clip, num_threads=num_threads)
    assert_same_bits(actual, reference(sample, model_output, noise, clip))


def test_unaligned_arrays():
    sample, model_output, noise = (array[1:] for array in make_inputs(1000))
    out = np.empty(1001, np.float32)[2:]
    assert_same_bits(native_step(sample, model_output, noise, out=out), reference(sample, model_output, noise))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["sample", "model_output", "noise"])
def test_out_may_be_an_input(which, num_threads):
    arrays = make_inputs(2_000_003)
    expected = reference(*arrays, clip=1.0)
    assert_same_bits(native_step(*arrays, clip=1.0, out=arrays[which], num_threads=num_threads), expected)


@pytest.mark.parametrize("clip", [INF, 1.0])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["sample", "model_output", "noise"])
def test_nan_stays_nan_and_where_it_was(which, clip):
    arrays = make_inputs(1023)
    arrays[which][[0, 500, 1022]] = np.nan
    out = native_step(*arrays, clip=clip)
    assert np.flatnonzero(np.isnan(out)).tolist() == [0, 500, 1022]


def test_writes_nothing_outside_out():
    sample, model_output, _ = make_inputs(100)
    buffer = np.full(104, 7, np.float32)
    native_step(sample, model_output, out=buffer[2:102])
    assert (buffer[[0, 1, 102, 103]] == 7).all()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("sample_ptr", 0, "sample_ptr is a null pointer"),
        ("model_output_ptr", 0, "model_output_ptr is a null pointer"),
        ("out_ptr", 0, "out_ptr is a null pointer"),
        ("numel", -1, "numel is -1"),
        ("coefficients", COEFFICIENTS[:6], "6 values instead of 7"),
        ("clip", 0.0, "clip is 0"),
        ("clip", float("nan"), "clip is nan"),
        ("num_threads", 0, "num_threads is 0"),
        ("guidance", INF, "guidance is inf"),
        ("dtypes", (0, 3, 0), "dtypes is 3"),
        ("dtypes", (2, 2, 2), "there is no fp16 on the CPU"),
        ("dtypes", (0, 0, 1), "out_ptr is sample_ptr, but their dtypes differ in size"),
        ("step", 2**32, "step is 4294967296"),
        ("out_ptr", 18, "out_ptr is not a multiple"),
    ],
)
def test_bad_arguments(argument, value, message):
    address = np.zeros(4, np.float32).ctypes.data
    arguments = {
        "sample_ptr": address,
        "model_output_ptr": address,
        "noise_ptr": 0,
        "out_ptr": address,
        "numel": 4,
        "coefficients": COEFFICIENTS,
        "clip": INF,
        "num_threads": 1,
    }
    with pytest.raises(ValueError, match=message):
        native.module.ddim_step(**arguments | {argument: value})


def test_empty_arrays_may_have_null_pointers():
    native.module.ddim_step(0, 0, 0, 0, 0, COEFFICIENTS, INF, 1)


def torch_step(sample, model_output, out, noise=None, clip=INF, num_threads=1, coefficients=COEFFICIENTS, **options):
    """As native_step, with tensors of any dtype."""
    codes = tuple((torch.float32, torch.bfloat16).index(t.dtype) for t in (sample, model_output, out))
    tensors = {name: options.pop(name) for name in ("unconditional", "seeds") if name in options}
    native.module.ddim_step(
        sample.data_ptr(),
        model_output.data_ptr(),
        0 if noise is None else noise.data_ptr(),
        out.data_ptr(),
        sample.numel(),
        coefficients,
        clip,
        num_threads,
        dtypes=codes,
        **{f"{name}_ptr": tensor.data_ptr() for name, tensor in tensors.items()},
        **options,
    )
    return out


def torch_reference(sample, model_output, noise=None, unconditional=None, guidance=1.0, clip=INF):
    arrays = [None if t is None else t.float().numpy() for t in (sample, model_output, noise, unconditional)]
    x, m, z, n = arrays
    if n is not None:
        m = n + np.float32(guidance) * (m - n)
    return torch.from_numpy(reference(x, m, z, clip))


@every_pair(
    numel=[0, 1, 17, 1023, 1_200_001],
    dtypes=[(0, 0, 0), (1, 1, 1), (0, 1, 0), (1, 0, 0), (0, 0, 1)],
    with_noise=[False, True],
    guided=[False, True],
)
def test_bf16_and_guidance(numel, dtypes, with_noise, guided):
    state, network, result = ((torch.float32, torch.bfloat16)[code] for code in dtypes)
    generator = torch.Generator().manual_seed(0)
    sample, noise = torch.randn(2, numel, generator=generator).to(state)
    model_output, unconditional = torch.randn(2, numel, generator=generator).to(network)
    options = {"noise": noise} if with_noise else {}
    options |= {"unconditional": unconditional, "guidance": 7.5} if guided else {}
    memory = torch.full((numel + 2,), 7.0, dtype=result)
    out = torch_step(sample, model_output, memory[1:-1], clip=1.0, num_threads=2, **options)
    expected = torch_reference(sample, model_output, clip=1.0, **options).to(result)
    assert torch.equal(out, expected)
    assert memory[0] == memory[-1] == 7


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 2), (3, 32, 32), (1, 300, 300)], ids=str)
@pytest.mark.parametrize("number", [0, 7, 2**32 - 1])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_noise_of_seeds_is_seeded_noise(shape, number, num_threads):
    seeds = torch.tensor([5, 0, 2**40 + 3, 2**63 - 1, 5])
    z = seeded_noise(seeds, number, shape).flatten()
    options = {"seeds": seeds, "image_numel": z.numel() // 5, "step": number, "num_threads": num_threads}
    sample, model_output = torch.randn(2, z.numel(), generator=torch.Generator().manual_seed(0))
    drawn = torch_step(sample, model_output, torch.empty_like(z), coefficients=(0, 0, 0, 0, 0, 0, 1), **options)
    # The mathematical libraries may round differently, once in many millions.
    np.testing.assert_array_max_ulp(drawn.numpy(), z.numpy())
    assert (drawn == z).float().mean() > 0.9999
    out = torch_step(sample, model_output, torch.empty_like(z), **options)
    assert torch.equal(out, torch_reference(sample, model_output, noise=drawn))


@pytest.mark.parametrize("which", ["sample", "model_output", "unconditional", "noise"])
def test_out_may_be_an_input_of_bf16(which):
    arrays = dict(
        zip(("sample", "model_output", "unconditional", "noise"), torch.randn(4, 1000).bfloat16().clone(), strict=True)
    )
    expected = torch_reference(**arrays, guidance=2.0).bfloat16()
    assert torch.equal(torch_step(**arrays, guidance=2.0, out=arrays[which]), expected)


def test_nothing_is_drawn_where_sigma_is_zero():
    sample, model_output = torch.randn(2, 64)
    seeds = torch.tensor([3])
    coefficients = (*COEFFICIENTS[:6], 0.0)
    out = torch_step(sample, model_output, torch.empty(64), coefficients=coefficients, seeds=seeds, image_numel=64)
    assert torch.equal(out, torch_reference(sample, model_output))
