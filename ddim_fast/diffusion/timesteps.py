"""The timesteps of a sampling run. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ops.scalars import is_whole, plain
from .schedule import NoiseSchedule
from .solvers import FITTED

__all__ = ["ADAPTIVE", "SPACINGS", "choose_fitted", "distinct", "select_timesteps", "unipc_timesteps"]

# The spacing that does not come from the schedule: timesteps fitted to a model, for :class:`ddim_fast.Sampler`.
ADAPTIVE = "adaptive"


def select_timesteps(
    schedule: NoiseSchedule, steps: int | None, spacing: str | Sequence[int] = "quadratic", start: int | None = None
) -> np.ndarray:
    """The timesteps of a sampling run, noisiest first.

    With T training timesteps, S steps and i = 0..S-1 (noise grows with i):

    linear
        floor(i (T - 1) / (S - 1)): tau_i = floor(c i) of Song et al. 2021, appendix D.2
    quadratic
        floor(c i^2) with c = (T - 1) / (S - 1)^2: small steps at low noise (ibid.)
    leading
        i floor(T / S); diffusers' default
    trailing
        round((i + 1) T / S) - 1; always starts from t = T - 1 (Lin et al. 2024, table 2)
    linspace
        round(i (T - 1) / (S - 1))
    log-snr
        uniform in the log signal-to-noise ratio (Lu et al. 2022, DPM-Solver)
    karras, exponential
        between the training timesteps, float64: sigma^(1/7) (Karras et al. 2022, eq. 5) or log(sigma) is uniform from the
        highest noise to the lowest, where sigma = sqrt(1 / alphas_cumprod - 1); the network has to take such timesteps, as
        :class:`ddim_fast.UNet` does
    ermongroup-uniform, ermongroup-quad
        the lists of the DDIM authors' code. ``range(0, T, T // S)`` has more than S timesteps if S does not divide T.
        ``int(linspace(0, sqrt(0.8 T), S)^2)`` starts at t = 0.8 T and can repeat timesteps near 0; a repeated one is a step
        that changes nothing

    All but the last two give S distinct timesteps: a timestep that rounding would repeat moves to the next free one.

    Args:
        schedule: the noise schedule.
        steps: S, from 1 to T; may be None with an explicit list.
        spacing: a name from above, or the timesteps themselves, in either direction, distinct.
        start: the largest timestep, for a run from images with less noise: the schedule counts as ending there, and larger
            timesteps of a list are left out. None is the whole schedule.

    Returns:
        (S,) falling; int64, but float64 for ``karras`` and ``exponential``.

    Raises:
        ValueError: the spacing is unknown, S is impossible for it or for the schedule, or the list has repeated timesteps.
    """
    total = schedule.num_train_timesteps
    steps, start = plain(steps), plain(start)
    if start is not None:
        if not is_whole(start) or not 0 <= start < total:
            raise ValueError(f"start must be a timestep from 0 to {total - 1}; got {start!r}")
        if isinstance(spacing, str):
            return select_timesteps(NoiseSchedule(schedule.betas[: start + 1]), steps, spacing)
    if not isinstance(spacing, str):
        listed = _explicit(spacing, steps, total)
        return listed if start is None else _up_to(start, listed)
    if spacing == ADAPTIVE:
        raise ValueError(
            "adaptive timesteps are fitted to a model, not made from a schedule: Sampler(model, spacing='adaptive')"
        )
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}; there are {', '.join((*SPACINGS, ADAPTIVE))}")
    if not is_whole(steps) or not 1 <= steps <= total:
        raise ValueError(f"steps must be a whole number from 1 to {total}, the number of training timesteps; got {steps!r}")
    if spacing in _CONTINUOUS:
        return _between(schedule, steps, _CONTINUOUS[spacing])[::-1].copy()
    if spacing.startswith("ermongroup"):
        return _SPACINGS[spacing](schedule, steps)[::-1].astype(np.int64)
    return distinct(_SPACINGS[spacing](schedule, steps).astype(np.int64), total)[::-1].copy()


def unipc_timesteps(model: Any, schedule: NoiseSchedule, steps: int) -> list[int]:
    """Timesteps for UniPC, noisiest first: those fitted to the model where it has some, otherwise quadratic ones."""
    fitted = (getattr(model, "fitted_timesteps", None) or {}).get("unipc", {})
    return fitted.get(steps) or select_timesteps(schedule, steps, "quadratic").tolist()


def choose_fitted(
    spacing: str | Sequence[int], solver: str, steps: int | None, model: Any
) -> tuple[str | Sequence[int], list[list[float]] | None]:
    """What was fitted to a model, where a sampler asks for it: timesteps in place of spacing ``adaptive``, or the timesteps and
    coefficients of the solver ``fitted``. Otherwise the spacing as it is, and None.

    Args:
        solver: the solver; ``ddpm`` uses the timesteps of ``ddim``.
        model: has ``fitted_timesteps``, by solver and number of steps, and ``fitted_coefficients``, or None there.

    Raises:
        ValueError: nothing is fitted for that solver and number of steps.
    """
    if solver != FITTED and not (isinstance(spacing, str) and spacing == ADAPTIVE):
        return spacing, None
    runs = (getattr(model, "fitted_timesteps", None) or {}).get("ddim" if solver == "ddpm" else solver)
    if not runs and solver == FITTED:
        raise ValueError(
            "solver fitted: none has been fitted to this model; fit one by python -m ddim_fast.evaluate --fit-solver 4,5,6 "
            "--model MODEL"
        )
    if not runs and solver == "consistency":
        raise ValueError(
            "spacing adaptive: solver consistency takes the timesteps that a model was trained for by python -m "
            "ddim_fast.train --consistency 999,400 --init MODEL; this model was not"
        )
    if not runs:
        raise ValueError(
            f"spacing adaptive: no timesteps have been fitted to this model and {solver}; fit them once by python -m "
            "ddim_fast.evaluate --fit-timesteps --model MODEL"
        )
    if steps not in runs:
        wanted = "solver fitted: the one" if solver == FITTED else "spacing adaptive: the timesteps"
        listed = ", ".join(map(str, sorted(runs))) if solver == FITTED else f"{min(runs)} to {max(runs)}"
        verb = "is" if solver == FITTED else "are"
        raise ValueError(f"{wanted} fitted to this model {verb} for {listed} steps; got {steps}")
    return runs[steps], model.fitted_coefficients[steps] if solver == FITTED else None


def _linear(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    return np.floor(_fractions(steps) * (schedule.num_train_timesteps - 1) + _ROUNDING)


def _quadratic(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    return np.floor(_fractions(steps) ** 2 * (schedule.num_train_timesteps - 1) + _ROUNDING)


def _leading(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    return np.arange(steps) * (schedule.num_train_timesteps // steps)


def _trailing(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    total = schedule.num_train_timesteps
    return np.round(total - np.arange(steps)[::-1] * (total / steps)) - 1


def _linspace(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    return np.round(np.linspace(0, schedule.num_train_timesteps - 1, steps)) if steps > 1 else _last(schedule)


def _log_snr(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    log_snr = schedule.log_snr
    if np.isneginf(log_snr[-1]):  # zero terminal SNR: keep it as the noisiest timestep, at the distance of the one before
        log_snr[-1] = 2 * log_snr[-2] - log_snr[-3] if len(log_snr) > 2 else log_snr[0] - 1
    targets = np.linspace(log_snr[0], log_snr[-1], steps) if steps > 1 else log_snr[-1:]
    return np.abs(targets[:, None] - log_snr[None, :]).argmin(axis=1)


def _between(schedule: NoiseSchedule, steps: int, scale: tuple[Any, Any]) -> np.ndarray:
    """Timesteps between those of training, rising: uniform in ``scale[0](sigma)``; ``scale[1]`` is its inverse."""
    log_sigma = -0.5 * schedule.log_snr
    if not np.all(np.isfinite(log_sigma)):
        raise ValueError("spacings karras and exponential need a schedule whose last noise level is finite; use trailing")
    scaled, unscaled = scale
    low, high = scaled(np.exp(log_sigma[[0, -1]]))
    sigma = unscaled(np.linspace(low, high, steps)) if steps > 1 else np.exp(log_sigma[-1:])
    return np.interp(np.log(sigma), log_sigma, np.arange(schedule.num_train_timesteps))


def _ermongroup_uniform(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    total = schedule.num_train_timesteps
    return np.arange(0, total, total // steps)


def _ermongroup_quad(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    return (np.linspace(0, np.sqrt(schedule.num_train_timesteps * 0.8), steps) ** 2).astype(np.int64)


_SPACINGS = {
    "linear": _linear,
    "quadratic": _quadratic,
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "log-snr": _log_snr,
    "ermongroup-uniform": _ermongroup_uniform,
    "ermongroup-quad": _ermongroup_quad,
}
# Spacings between the training timesteps: what is uniform in sigma, and sigma from it.
_CONTINUOUS: dict[str, tuple[Any, Any]] = {
    "karras": (lambda sigma: sigma ** (1 / 7), lambda root: root**7),
    "exponential": (np.log, np.exp),
}
SPACINGS = (*_SPACINGS, *_CONTINUOUS)

# Added before a floor, so that rounding does not take a whole product to the integer below.
_ROUNDING = 1e-9


def _fractions(steps: int) -> np.ndarray:
    """0 to 1 in S points; a single step starts from the noisiest timestep."""
    return np.linspace(0, 1, steps) if steps > 1 else np.ones(1)


def _last(schedule: NoiseSchedule) -> np.ndarray:
    return np.array([schedule.num_train_timesteps - 1])


def distinct(rising: np.ndarray, total: int) -> np.ndarray:
    """The nearest strictly rising sequence in 0..total-1: repeats move up to the next free timestep, and down at the end."""
    i = np.arange(len(rising))
    strictly = np.maximum.accumulate(rising - i) + i
    return np.minimum(strictly, total - len(rising) + i)


def _up_to(start: int, listed: np.ndarray) -> np.ndarray:
    left = listed[listed <= start]
    if not len(left):
        raise ValueError(f"no listed timestep lies in 0..{start}, where the run starts; got {listed.min()}..{listed.max()}")
    return left


def _explicit(timesteps: Sequence[int], steps: int | None, total: int) -> np.ndarray:
    chosen = np.asarray(timesteps)
    if chosen.ndim != 1 or chosen.size == 0 or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(f"timesteps must be a non-empty list of whole numbers; got {timesteps!r}")
    if chosen.min() < 0 or chosen.max() >= total:
        raise ValueError(f"timesteps must lie in 0..{total - 1}; got {chosen.min()}..{chosen.max()}")
    values, times = np.unique(chosen, return_counts=True)
    if len(values) != len(chosen):
        raise ValueError(f"timesteps must be distinct; {values[times > 1][0]} is listed {times.max()} times")
    if steps is not None and steps != len(chosen):
        raise ValueError(f"steps is {steps}, but {len(chosen)} timesteps are listed; leave steps out")
    return np.sort(chosen)[::-1].astype(np.int64)
