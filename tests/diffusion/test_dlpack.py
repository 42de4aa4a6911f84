"""fast_ddim_step on arrays that are known through DLPack alone."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from ddim_fast import NoiseSchedule, fast_ddim_step

LEVELS = tuple(NoiseSchedule.linear().alphas_cumprod[[500, 450]])


class Foreign:
    """An array that shares its memory, and is nothing else."""

    def __init__(self, array) -> None:
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Old(Foreign):
    """Of a library that does not know DLPack 1.0, which says what may be written to."""

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__()


class Standard(Foreign):
    """Of a library that follows the array API standard."""

    def __array_namespace__(self):
        return self

    @staticmethod
    def from_dlpack(array) -> "Standard":
        return Standard(np.from_dlpack(array))


def arrays(dtype=np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((3, 2, 4, 5)).astype(dtype) for _ in range(4)]


@pytest.mark.parametrize("kind", [Foreign, Old])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_numpy_computes_on_the_cpu(kind, dtype):
    x, m, z, u = arrays(dtype)
    options = {"eta": 0.5, "guidance": 2.0, "clip_sample_range": 1.0}
    expected = fast_ddim_step(x, m, *LEVELS, noise=z, unconditional_output=u, **options)
    result = fast_ddim_step(kind(x), kind(m), *LEVELS, noise=kind(z), unconditional_output=kind(u), **options)
    assert isinstance(result, np.ndarray) and result.dtype == dtype
    np.testing.assert_array_equal(result, expected)


def test_torch_computes_what_numpy_does_not_hold():
    x, m = (torch.from_numpy(a).bfloat16() for a in arrays()[:2])
    result = fast_ddim_step(Foreign(x), Foreign(m), *LEVELS)
    assert result.dtype == torch.bfloat16 and torch.equal(result, fast_ddim_step(x, m, *LEVELS))
    wide = fast_ddim_step(Foreign(x), Foreign(m.float()), *LEVELS, out_dtype=torch.float32)
    assert torch.equal(wide, fast_ddim_step(x, m.float(), *LEVELS, out_dtype=torch.float32))


def test_the_result_is_of_the_callers_library_if_that_has_a_way():
    x, m = arrays()[:2]
    result = fast_ddim_step(Standard(x), Standard(m), *LEVELS)
    assert type(result) is Standard
    np.testing.assert_array_equal(result.array, fast_ddim_step(x, m, *LEVELS))


def test_levels_and_seeds_may_be_arrays():
    x, m = arrays()[:2]
    starts, ends, seeds = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, 0.6]), np.array([5, 6, 7])
    expected = fast_ddim_step(x, m, starts, ends, eta=1.0, seeds=seeds, step=3)
    foreign = map(Foreign, (x, m, starts, ends))
    np.testing.assert_array_equal(fast_ddim_step(*foreign, eta=1.0, seeds=Foreign(seeds), step=3), expected)
    np.testing.assert_array_equal(
        fast_ddim_step(Foreign(x), Foreign(m), Foreign(np.array(LEVELS[0])), LEVELS[1]), fast_ddim_step(x, m, *LEVELS)
    )


@pytest.mark.parametrize("kind", [Foreign, Old])
def test_nothing_is_copied(kind):
    x, m = arrays()[:2]
    expected = fast_ddim_step(x, m, *LEVELS)
    out = kind(np.zeros_like(x))
    assert fast_ddim_step(kind(x), kind(m), *LEVELS, out=out) is out
    np.testing.assert_array_equal(out.array, expected)
    in_place = kind(x)
    assert fast_ddim_step(in_place, kind(m), *LEVELS, out=in_place) is in_place
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_kinds_may_be_mixed_and_the_samples_decides(convert):
    x, m = arrays()[:2]
    expected = fast_ddim_step(x, m, *LEVELS)
    for sample, output, kind in ((convert(x), Foreign(m), type(convert(x))), (Foreign(x), convert(m), np.ndarray)):
        result = fast_ddim_step(sample, output, *LEVELS)
        assert type(result) is kind
        np.testing.assert_array_equal(np.asarray(result), expected)


def test_what_cannot_be_shared_is_named():
    x, m = arrays()[:2]
    gradient = torch.from_numpy(m).requires_grad_()
    with pytest.raises(ValueError, match=r"cannot share model_output of type Foreign through DLPack.*grad"):
        fast_ddim_step(Foreign(x), Foreign(gradient), *LEVELS)
    frozen = np.zeros_like(x)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"cannot share out of type Foreign|out of type Foreign is shared for reading"):
        fast_ddim_step(Foreign(x), Foreign(m), *LEVELS, out=Foreign(frozen))
    assert not frozen.any()
    with pytest.raises(ValueError, match="model_output has shape"):
        fast_ddim_step(Foreign(x), Foreign(m[:2]), *LEVELS)


def test_needs_no_torch():
    program = """
import sys
sys.modules["torch"] = None
import numpy as np
from ddim_fast import fast_ddim_step
class Foreign:
    def __init__(self, array):
        self.array = array
    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)
    def __dlpack_device__(self):
        return self.array.__dlpack_device__()
x = np.ones((2, 3), np.float32)
assert (fast_ddim_step(Foreign(x), Foreign(x), 0.3, 0.6) == fast_ddim_step(x, x, 0.3, 0.6)).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_compiles_as_before():
    x, m = (torch.from_numpy(a) for a in arrays()[:2])
    compiled = torch.compile(lambda x, m: fast_ddim_step(x, m, *map(float, LEVELS)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, m), fast_ddim_step(x, m, *LEVELS))


@pytest.mark.parametrize("library", ["array_api_strict", "jax.numpy", "cupy"])
def test_other_libraries(library):
    xp = pytest.importorskip(library)
    x, m = arrays()[:2]
    result = fast_ddim_step(xp.asarray(x), xp.asarray(m), *LEVELS)
    assert type(result) is type(xp.asarray(x))
    np.testing.assert_array_equal(np.from_dlpack(result), fast_ddim_step(x, m, *LEVELS))
