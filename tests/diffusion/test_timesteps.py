import numpy as np
import pytest
from diffusers import DDIMScheduler

from ddim_fast import NoiseSchedule, select_timesteps
from ddim_fast.diffusion.timesteps import SPACINGS

SCHEDULE = NoiseSchedule.linear()
COUNTS = [1, 2, 3, 7, 10, 20, 30, 50, 96, 100, 333, 999, 1000]


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("spacing", [s for s in SPACINGS if not s.startswith("ermongroup")])
def test_s_steps_are_s_distinct_timesteps(spacing, steps):
    chosen = select_timesteps(SCHEDULE, steps, spacing)
    assert len(chosen) == steps
    assert np.all(np.diff(chosen) < 0)
    assert chosen[-1] >= 0 and chosen[0] < 1000


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_equals_diffusers(spacing, steps):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(select_timesteps(SCHEDULE, steps, spacing), scheduler.timesteps.numpy())


@pytest.mark.parametrize("steps,count", [(10, 10), (20, 20), (30, 31), (60, 63), (1000, 1000)])
def test_the_reference_uniform_list(steps, count):
    chosen = select_timesteps(SCHEDULE, steps, "ermongroup-uniform")
    assert list(chosen[::-1]) == list(range(0, 1000, 1000 // steps))
    assert len(chosen) == count


@pytest.mark.parametrize("steps,distinct", [(10, 10), (20, 20), (50, 49), (100, 96)])
def test_the_reference_quadratic_list(steps, distinct):
    chosen = select_timesteps(SCHEDULE, steps, "ermongroup-quad")
    assert list(chosen[::-1]) == [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
    assert len(set(chosen)) == distinct


def test_quadratic_follows_its_formula():
    chosen = select_timesteps(SCHEDULE, 10, "quadratic")[::-1]
    np.testing.assert_array_equal(chosen, [i * i * 999 // 81 for i in range(10)])


def test_log_snr_is_uniform_in_log_snr():
    log_snr = SCHEDULE.log_snr[select_timesteps(SCHEDULE, 8, "log-snr")]
    gaps = np.diff(log_snr)
    assert gaps.max() / gaps.min() < 1.25


def test_log_snr_with_zero_terminal_snr_starts_from_pure_noise():
    assert select_timesteps(SCHEDULE.rescale_zero_terminal_snr(), 20, "log-snr")[0] == 999


def test_one_step_starts_from_the_noisiest_timestep():
    for spacing in ("linear", "quadratic", "trailing", "linspace", "log-snr"):
        assert list(select_timesteps(SCHEDULE, 1, spacing)) == [999]


def test_an_explicit_list_in_either_direction():
    for given in ([0, 10, 999], [999, 10, 0], np.array([10, 999, 0])):
        assert list(select_timesteps(SCHEDULE, None, given)) == [999, 10, 0]


@pytest.mark.parametrize(
    "steps,spacing,message",
    [
        (0, "linear", "from 1 to 1000.*got 0"),
        (1001, "quadratic", "from 1 to 1000.*got 1001"),
        (2.5, "linear", "whole number"),
        (10, "cubic", "unknown spacing 'cubic'"),
        (None, [1, 1], "distinct"),
        (None, [1, 1000], "0..999"),
        (None, [], "non-empty"),
        (None, [0.5], "whole numbers"),
        (3, [1, 2], "steps is 3, but 2"),
    ],
)
def test_impossible_choices_are_named(steps, spacing, message):
    with pytest.raises(ValueError, match=message):
        select_timesteps(SCHEDULE, steps, spacing)


@pytest.mark.parametrize("spacing,scale", [("karras", lambda sigma: sigma ** (1 / 7)), ("exponential", np.log)])
def test_spacings_between_timesteps_are_uniform_in_their_scale(spacing, scale):
    chosen = select_timesteps(SCHEDULE, 8, spacing)
    assert chosen.dtype == np.float64 and (chosen[0], chosen[-1]) == pytest.approx((999, 0), abs=1e-9)
    levels = SCHEDULE.levels(chosen)[:-1]
    gaps = np.diff(scale(np.sqrt(1 / levels - 1)))
    np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-6)
    # At whole timesteps, and between their neighbours elsewhere.
    np.testing.assert_allclose(SCHEDULE.levels(np.arange(1000.0)), SCHEDULE.levels(np.arange(1000)), rtol=1e-12)
    assert np.all(levels <= SCHEDULE.levels(np.floor(chosen).astype(int))[:-1] * (1 + 1e-9))


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_spacings_by_noise_need_a_finite_noise(spacing):
    with pytest.raises(ValueError, match="need a schedule whose last noise level is finite; use trailing"):
        select_timesteps(SCHEDULE.rescale_zero_terminal_snr(), 8, spacing)
