"""The coefficients of every solver, on every schedule, spacing, number of steps and prediction type."""

from __future__ import annotations

import itertools
from itertools import pairwise

import numpy as np
import pytest
import torch

from ddim_fast import NoiseSchedule, Sampler
from ddim_fast.diffusion.prediction import prediction_coefficients
from ddim_fast.diffusion.solvers import FITTED, SOLVERS, make_solver, network_timesteps
from ddim_fast.diffusion.timesteps import SPACINGS, select_timesteps

TYPES = ("epsilon", "v_prediction", "sample")
PLAIN = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "sigmoid": NoiseSchedule.sigmoid(),
    "few timesteps": NoiseSchedule.linear(num_train_timesteps=5),
    "two timesteps": NoiseSchedule.cosine(2),
}
SCHEDULES = {
    **PLAIN,
    **{f"{name}, zero SNR": schedule.rescale_zero_terminal_snr() for name, schedule in PLAIN.items()},
    "hardly any signal": NoiseSchedule.linear(1e-4, 0.6),
}
BETWEEN = ("karras", "exponential")  # for finite noise levels


def runs(schedule: NoiseSchedule):
    """The timesteps of runs of every spacing with few steps, and of some with many."""
    for spacing, steps in [*itertools.product(SPACINGS, (1, 2, 3, 7, 50)), ("quadratic", 333), ("linear", 1000)]:
        if steps <= schedule.num_train_timesteps and not (schedule.alphas_cumprod[-1] == 0 and spacing in BETWEEN):
            yield select_timesteps(schedule, steps, spacing)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_coefficients_are_finite_and_variances_add_up(name, prediction_type):
    etas = {"ddim": (0.0, 0.5, 1.0, "sigma-hat")}
    schedule = SCHEDULES[name]
    for timesteps in runs(schedule):
        repeats = bool((np.diff(schedule.levels(timesteps)) <= 0).any())
        for solver, eta in ((s, eta) for s in SOLVERS if s != FITTED for eta in etas.get(s, (0.0,))):
            levels = schedule.levels(network_timesteps(solver, timesteps))
            undetermined = prediction_type == "epsilon" and levels[0] < 1e-60
            if (repeats and solver in ("dpm-solver++", "dpm-solver++3m", "heun", "unipc")) or undetermined:
                with pytest.raises(ValueError, match="repeats" if repeats and not undetermined else "repeats|at zero SNR"):
                    make_solver(solver, levels, eta, prediction_type, None)
                continue
            table = make_solver(solver, levels, eta, prediction_type, None).table.astype(np.float64)
            assert np.isfinite(table).all()
            a, b = levels[:-1], levels[1:]
            if solver == "ddim":
                u, v, sigma = table[:, 4:].T
                np.testing.assert_allclose(u**2, b, rtol=1e-6, atol=1e-12)
                if eta != "sigma-hat":
                    np.testing.assert_allclose(v**2 + sigma**2, 1 - b, rtol=1e-6, atol=1e-12)
            elif solver == "ddpm":  # x_t, of variance 1 - a beside the signal, takes the place of epsilon
                u, v, sigma = table[:, 4:].T
                np.testing.assert_allclose(u + v * np.sqrt(a), np.sqrt(b), rtol=1e-5, atol=1e-12)
                np.testing.assert_allclose(v**2 * (1 - a) + sigma**2, 1 - b, rtol=1e-5, atol=1e-12)
            elif solver == "consistency":
                u, v, sigma = table[:, 4:].T
                assert not v.any()
                np.testing.assert_allclose(u, np.sqrt(b), rtol=1e-6, atol=1e-12)
                np.testing.assert_allclose(sigma, np.sqrt(1 - b), rtol=1e-6, atol=1e-12)
            else:  # the image that is predicted all along is what is left in the end
                from_x, *from_x0 = table[:, -4 if solver == "dpm-solver++3m" else -3 :].T
                rounding = 1e-6 * np.maximum(1, np.abs(from_x0).max())  # of coefficients that cancel, in float32
                np.testing.assert_allclose(from_x * np.sqrt(a) + sum(from_x0), np.sqrt(b), rtol=1e-5, atol=rounding)


@pytest.mark.parametrize("betas", [[0.5], [1e-9] * 4, np.linspace(1e-4, 0.9, 2000)], ids=["one", "constant", "no signal"])
def test_what_cannot_be_rescaled_to_zero_snr(betas):
    with pytest.raises(ValueError, match="zero terminal SNR needs"):
        NoiseSchedule.from_betas(betas).rescale_zero_terminal_snr()


class _Euler:
    """Euler's method on the probability flow as a solver of somebody's own: eps from x_0, and x from both."""

    stochastic = takes_eta = False
    needs_distinct_timesteps = True
    memory = 0

    def __init__(self, alphas_cumprod, eta, prediction_type, clip):
        self.clip, rows = clip, []
        for a, b in pairwise(map(float, alphas_cumprod)):
            x0 = prediction_coefficients(a, prediction_type)[:2]
            rows.append((*x0, a**0.5, (1 - a) ** 0.5, b**0.5, (1 - b) ** 0.5))
        self.table = np.array(rows, np.float32)

    def start(self, x):
        return (x,)

    def step(self, state, output, table, index, seeds):
        return self.combine(state, output, table.index_select(0, index.reshape(1))[0].unbind())

    def combine(self, state, output, row, noise=None):
        from_x, from_output, signal, sigma, signal_next, sigma_next = row
        x0 = from_x * state[0] + from_output * output
        return (signal_next * x0 + sigma_next * ((state[0] - signal * x0) * (1 / sigma)),)

    def predict_x0(self, i, x, output):
        return self.table[i, 0] * x + self.table[i, 1] * output


@pytest.mark.parametrize("engine", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_solver_is_added_in_one_place(engine, monkeypatch, small_unet):
    """As docs/architecture.md says; this one is DDIM in other words."""
    monkeypatch.setitem(SOLVERS, "euler", _Euler)
    request = {"seeds": [0, 1], "labels": [2, 3], "guidance": 2.0}
    images = Sampler(small_unet, steps=5, solver="euler", engine=engine).sample(**request)
    torch.testing.assert_close(images, Sampler(small_unet, steps=5).sample(**request), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="eta is an option of the ddim solver; euler takes eta = 0 only"):
        Sampler(small_unet, steps=5, solver="euler", eta=0.5)
    with pytest.raises(ValueError, match="the euler solver needs timesteps without repeats"):
        Sampler(small_unet, steps=500, solver="euler", spacing="ermongroup-quad")
