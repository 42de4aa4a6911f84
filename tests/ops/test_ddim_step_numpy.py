"""fast_ddim_step on numpy arrays: the same bits as on tensors, and no torch in the process."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch

from ddim_fast import fast_ddim_step
from ddim_fast.ops import native

A, B = 0.23, 0.61
BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(native.module is None, reason=str(native.why_not)))]


def make_inputs(shape=(3, 2, 5, 7), dtype=np.float32):
    """sample, model_output, noise and an unconditional output."""
    generator = np.random.default_rng(0)
    return tuple(generator.standard_normal(shape).astype(dtype) for _ in range(4))


def on_tensors(*arrays, **options):
    """The same step on tensors, by the reference."""
    convert = lambda a: torch.from_numpy(a) if isinstance(a, np.ndarray) else a  # noqa: E731
    return fast_ddim_step(*map(convert, arrays), **{k: convert(v) for k, v in options.items()}).numpy()


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, "sigma-hat"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("forced", BACKENDS)
def test_equals_the_step_on_tensors_bit_for_bit(forced, prediction_type, eta, clip, monkeypatch):
    sample, output, noise, unconditional = make_inputs()
    options = {"eta": eta, "prediction_type": prediction_type, "clip_sample_range": clip, "guidance": 3.0}
    options |= {"noise": noise, "unconditional_output": unconditional}
    monkeypatch.setenv("DDIM_FAST_BACKEND", "reference")
    expected = on_tensors(sample, output, A, B, **options)
    monkeypatch.setenv("DDIM_FAST_BACKEND", forced)
    actual = fast_ddim_step(sample, output, A, B, **options)
    assert isinstance(actual, np.ndarray)
    np.testing.assert_array_equal(actual, expected, strict=True)
    assert fast_ddim_step(sample, output, A, B, **options, out=sample) is sample
    np.testing.assert_array_equal(sample, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_dtype_layout_and_levels(dtype):
    sample, output, *_ = make_inputs(dtype=dtype)
    levels = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.5, 1.0])
    for x, y in (
        (sample, output),
        (sample[..., ::2], output[..., ::2]),
        (sample.transpose(0, 2, 3, 1), output.transpose(0, 2, 3, 1)),
    ):
        for a, b in ((A, B), levels, (levels[0], 1.0), (np.float32(A), np.float32(B))):
            actual = fast_ddim_step(x, y, a, b)
            assert actual.dtype == dtype
            expected = on_tensors(np.ascontiguousarray(x), np.ascontiguousarray(y), a, b)
            np.testing.assert_allclose(actual, expected, rtol=2 * np.finfo(dtype).eps, atol=2 * np.finfo(dtype).eps)
    assert fast_ddim_step(sample, output, A, B, out_dtype=np.float64).dtype == np.float64


@pytest.mark.parametrize("forced", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (3, 3, 8, 8), (3,)])
def test_noise_from_seeds(forced, shape, monkeypatch):
    sample, output, *_ = make_inputs(shape)
    seeds = [7, 2**63 - 1, 0]
    expected = on_tensors(sample, output, A, B, eta=1.0, seeds=seeds, step=3)
    monkeypatch.setenv("DDIM_FAST_BACKEND", forced)
    for form in (seeds, np.array(seeds)):
        actual = fast_ddim_step(sample, output, A, B, eta=1.0, seeds=form, step=3)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_empty_arrays_are_no_error():
    empty = np.empty((0, 3, 8, 8), np.float32)
    assert fast_ddim_step(empty, empty, A, B, eta=1.0, seeds=[]).shape == empty.shape


X = np.zeros((2, 3, 4, 4), np.float32)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model_output": X[:1]}, r"model_output has shape \(1, 3, 4, 4\), but sample has \(2, 3, 4, 4\)"),
        ({"sample": X.astype(int)}, "sample must be a floating-point array; got int64"),
        ({"out": X.astype(int)}, "out must be a floating-point array"),
        ({"out": X, "out_dtype": np.float64}, "out_dtype is float64, but out is float32"),
        ({"eta": 0.5}, "eta = 0.5 needs noise or seeds"),
        ({"eta": float("nan"), "noise": X}, "eta must lie in .*got nan"),
        ({"eta": 1.0, "noise": X[0]}, "noise has shape"),
        ({"eta": 1.0, "seeds": [1]}, "seeds must be int64, one an image"),
        ({"eta": 1.0, "seeds": [1, -2]}, "a seed is a whole number.*got -2"),
        ({"eta": 1.0, "seeds": np.zeros(2)}, "seeds must be int64.*got float64"),
        ({"eta": 1.0, "seeds": [1, 2], "noise": X}, "not both"),
        ({"guidance": 2.0}, "belong together"),
        ({"guidance": float("nan"), "unconditional_output": X}, "guidance must be a finite number"),
        ({"alphas_cumprod_t": np.ones((2, 1))}, r"one number or one an image; got shape \(2, 1\)"),
        ({"alphas_cumprod_t": 2.0}, r"alphas_cumprod_t must lie in \[0, 1\]; got 2.0"),
        ({"clip_sample_range": 0}, "clip_sample_range must be positive"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"sample": X, "model_output": X, "alphas_cumprod_t": A, "alphas_cumprod_prev": B, **changes}
    with pytest.raises(ValueError, match=message):
        fast_ddim_step(**arguments)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["triton"] = None       # importing them fails
import numpy as np
from ddim_fast import NoiseSchedule, coefficient_table, fast_ddim_step, select_timesteps

schedule = NoiseSchedule.linear()
levels = [*schedule.alphas_cumprod[select_timesteps(schedule, 5, "quadratic")], 1.0]
x = np.ones((2, 3, 8, 8), np.float32)
for i in range(5):
    x = fast_ddim_step(x, 0.1 * x, levels[i], levels[i + 1], eta=0.5, seeds=[3, 4], step=i)
assert np.isfinite(x).all() and coefficient_table(levels).shape == (5, 7)
"""


@pytest.mark.parametrize("forced", BACKENDS)
def test_needs_no_torch(forced, monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", forced)
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_arrays_that_only_the_reference_can_read():
    rng = np.random.default_rng(0)
    x, e = rng.standard_normal((2, 4, 3, 5), dtype=np.float32)
    seeds = np.arange(8)
    step = functools.partial(fast_ddim_step, model_output=e, alphas_cumprod_t=0.3, alphas_cumprod_prev=0.5, eta=1.0)
    assert np.array_equal(step(x, seeds=seeds[::2]), step(x, seeds=seeds[::2].copy()))
    shifted = np.frombuffer(b"12" + x.tobytes(), np.float32, offset=2).reshape(x.shape)
    assert not shifted.flags.aligned
    assert np.allclose(step(shifted, seeds=seeds[:4]), step(x, seeds=seeds[:4]), atol=1e-6)


def test_what_is_for_reading_only_is_not_written():
    x = np.ones((2, 3), np.float32)
    x.flags.writeable = False
    with pytest.raises(ValueError, match="out can only be read"):
        fast_ddim_step(x, x, 0.3, 0.5, out=x)
