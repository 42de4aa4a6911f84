"""ddim_fast._native.ddim_step against numpy: the same operations in the same order must give the same bits."""

import numpy as np
import pytest

from ddim_fast.ops import native

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
@pytest.mark.parametrize("numel", [0, 1, 15, 17, 1023, 300_001, 2_000_003])
@pytest.mark.parametrize("clip", [INF, 1.0])
@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
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


@pytest.mark.gpu
@pytest.mark.skipif(not native.has_cuda, reason="ddim_fast._native was built without CUDA")
@pytest.mark.parametrize("numel", [0, 1, 17, 1023, 300_001])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("with_noise", [False, True])
def test_cuda_gives_the_same_bits_and_can_be_captured(numel, offset, with_noise):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    arrays = make_inputs(numel)
    tensors = [torch.empty(numel + offset, device="cuda")[offset:] for _ in range(4)]
    for tensor, array in zip(tensors[:3], arrays, strict=True):
        tensor.copy_(torch.from_numpy(array))
    sample, model_output, noise, out = tensors

    def step():
        native.module.ddim_step_cuda(
            sample.data_ptr(),
            model_output.data_ptr(),
            noise.data_ptr() if with_noise else 0,
            out.data_ptr(),
            numel,
            COEFFICIENTS,
            1.0,
            torch.cuda.current_stream().cuda_stream,
        )

    expected = reference(*arrays[: 2 + with_noise], clip=1.0)
    step()
    assert_same_bits(out.cpu().numpy(), expected)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    out.fill_(float("nan"))
    graph.replay()
    assert_same_bits(out.cpu().numpy(), expected)
