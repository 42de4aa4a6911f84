"""Solvers: DDIM, DDPM, DPM-Solver++(2M) and (3M), UniPC, Heun's, consistency sampling, and solvers fitted to a model.

All coefficients are computed in float64 when the solver is created, and stored in one float32 table, one row per step. So each
step is the same few multiply-adds over the images, and the step number may be a tensor that the host never reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from .prediction import NO_SIGNAL, prediction_coefficients
from .step import StepCoefficients, check_eta, posterior_coefficients, step_coefficients

__all__ = ["FITTED", "SOLVERS", "DDIMUpdate", "Fitted", "Solver", "StepFunction", "UniPC", "make_solver", "network_timesteps"]

if TYPE_CHECKING:
    from torch import Tensor

State = tuple[Any, ...]


class StepFunction(Protocol):
    """The interface of a solver for the sampling loop.

    Attributes:
        stochastic: whether :meth:`step` draws noise, and so needs seeds.
        clip: the predicted x_0 is clipped to [-clip, clip]; None does not.
    """

    stochastic: bool
    clip: float | None

    def start(self, x: Tensor) -> State:
        """The state before the first step: ``x``, (N, C, H, W) float32, and the solver's memory."""
        ...

    def step(self, state: State, output: Tensor, table: Tensor, index: Tensor, seeds: Tensor | None) -> State:
        """Take one step.

        Args:
            state: its first tensor is x at timestep ``index`` of the run.
            output: the network's output there, like x.
            table: the coefficients of all steps, on the device of x.
            index: () int64 on the same device, the number of the step.
            seeds: (N,) int64, one per image, if ``stochastic``; otherwise not read.

        Returns:
            The state at the next timestep.
        """
        ...


class Solver(StepFunction, Protocol):
    """A solver of the sampling ODE or SDE.

    Attributes:
        takes_eta: whether eta may be other than 0.
        needs_distinct_timesteps: whether every step must change the noise level.
        table: (S, ...) float32, the coefficients of each step.
        memory: the number of tensors like x in the state beside x; before the first step each may be x itself.
    """

    takes_eta: ClassVar[bool]
    needs_distinct_timesteps: ClassVar[bool]
    table: np.ndarray
    memory: int

    def combine(self, state: State, output: Any, row: Sequence[Any], noise: Any = None) -> State:
        """:meth:`step` as arithmetic, for anything that multiplies and adds and has a method ``clip``: tensors, arrays, and the
        values of a graph under construction.

        Args:
            state: as in :meth:`step`.
            output: the network's output.
            row: the step's row of :attr:`table`.
            noise: standard normal noise like x, if ``stochastic``.
        """
        ...

    def predict_x0(self, i: int, x: Any, output: Any) -> Any:
        """The network's x_0 at timestep i of the run, with the solver's clipping."""
        ...


def make_solver(
    name: str,
    alphas_cumprod: np.ndarray,
    eta: float | str,
    prediction_type: str,
    clip_sample_range: float | None,
    coefficients: Sequence[Sequence[float]] | None = None,
) -> Solver:
    """Create the solver ``name`` for a run.

    Args:
        name: one of :data:`SOLVERS`.
        alphas_cumprod: (S + 1,) float64, the noise level at each of the :func:`network_timesteps` and after the last.
        eta: see :func:`step_coefficients`; for ``ddim`` only, 0 with the others.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.
        clip_sample_range: clip x_0 to [-r, r] at each step; None does not clip.
        coefficients: the rows of :class:`Fitted`, which the solver ``fitted`` needs.

    Raises:
        ValueError: the solver is unknown, or an option does not fit it.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; there are {', '.join(SOLVERS)}")
    if clip_sample_range is not None and (not isinstance(clip_sample_range, (int, float)) or not clip_sample_range > 0):
        raise ValueError(f"clip_sample_range must be a positive number; got {clip_sample_range!r}")
    solver = SOLVERS[name]
    if check_eta(eta) != 0 and not solver.takes_eta:
        raise ValueError(f"eta is an option of the ddim solver; {name} takes eta = 0 only (got {eta!r})")
    if solver.needs_distinct_timesteps and not np.all(np.diff(alphas_cumprod) > 0):
        raise ValueError(f"the {name} solver needs timesteps without repeats; choose another spacing")
    if name == FITTED:
        return solver(coefficients, clip_sample_range)
    return solver(alphas_cumprod, eta, prediction_type, clip_sample_range)


class DDIMUpdate:
    """A solver without memory: each step is the DDIM operator with its own ``coefficients``, in the order of steps."""

    memory = 0
    takes_eta = needs_distinct_timesteps = False

    def __init__(self, coefficients: list[StepCoefficients], clip: float | None = None) -> None:
        self.coefficients = coefficients
        self.table = np.array(coefficients, dtype=np.float32)
        self.clip = clip
        self.stochastic = any(c.sigma for c in coefficients)

    def start(self, x: Tensor) -> State:
        return (x,)

    def step(self, state: State, output: Tensor, table: Tensor, index: Tensor, seeds: Tensor | None) -> State:
        from ..ops.ddim_step import ddim_step  # not above: programs without torch use the solvers

        return (ddim_step(state[0], output, table, self.clip, seeds=seeds if self.stochastic else None, step=index),)

    def combine(self, state: State, output: Any, row: Sequence[Any], noise: Any = None) -> State:
        x0_from_sample, x0_from_output, eps_from_sample, eps_from_output, from_x0, from_eps, sigma = row
        (x,) = state
        x0 = _predict_x0(x0_from_sample, x0_from_output, x, output, self.clip)
        x = from_x0 * x0 + from_eps * (eps_from_sample * x + eps_from_output * output)
        return (x + sigma * noise,) if self.stochastic else (x,)

    def predict_x0(self, i: int, x: Any, output: Any) -> Any:
        return _predict_x0(*self.coefficients[i][:2], x, output, self.clip)


class DDIM(DDIMUpdate):
    """Song et al. 2021, eq. 12; eta as in eq. 16."""

    takes_eta = True

    def __init__(self, alphas_cumprod: np.ndarray, eta: float | str, prediction_type: str, clip: float | None) -> None:
        super().__init__([step_coefficients(a, b, eta, prediction_type) for a, b in _pairs(alphas_cumprod)], clip)


class DDPM(DDIMUpdate):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), with the smaller variance, on any timesteps."""

    def __init__(self, alphas_cumprod: np.ndarray, eta: float | str, prediction_type: str, clip: float | None) -> None:
        super().__init__([posterior_coefficients(a, b, prediction_type) for a, b in _pairs(alphas_cumprod)], clip)


class Consistency(DDIMUpdate):
    """Multistep consistency sampling (Song et al. 2023, algorithm 1), for a model of ``train --consistency``: each step leads
    to x_0 and adds new noise of the next level."""

    def __init__(self, alphas_cumprod: np.ndarray, eta: float | str, prediction_type: str, clip: float | None) -> None:
        rows = [step_coefficients(a, b, 0.0, prediction_type) for a, b in _pairs(alphas_cumprod)]
        super().__init__([row._replace(prev_from_eps=0.0, sigma=row.prev_from_eps) for row in rows], clip)


class _MultiStep:
    """Solvers in the log signal-to-noise ratio that use x_0 predictions of the present and earlier steps."""

    stochastic = takes_eta = False
    needs_distinct_timesteps = True

    def __init__(self, alphas_cumprod: np.ndarray, eta: float | str, prediction_type: str, clip: float | None) -> None:
        # The first two numbers of each row are the coefficients of x_0 from x and the network's output.
        self._prediction = [prediction_coefficients(float(a), prediction_type)[:2] for a in alphas_cumprod[:-1]]
        self.clip = clip
        self.steps = len(alphas_cumprod) - 1
        self._alpha, self._sigma = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
        with np.errstate(divide="ignore"):
            self._lambda = np.log(self._alpha) - np.log(self._sigma)

    def predict_x0(self, i: int, x: Any, output: Any) -> Any:
        return _predict_x0(*self._prediction[i], x, output, self.clip)

    def combine(self, state: State, output: Any, row: Sequence[Any], noise: Any = None) -> State:
        """The solver's own step; ``step`` calls it."""
        raise NotImplementedError

    def step(self, state: State, output: Tensor, table: Tensor, index: Tensor, seeds: Tensor | None) -> State:
        return self.combine(state, output, table.index_select(0, index.reshape(1))[0].unbind())

    def _first_order(self, i: int) -> tuple[float, float]:
        """(a, b) such that a x + b x_0 is the first-order step from i to i + 1: DDIM's. b is alpha (1 - e^-h)."""
        alpha, sigma = self._alpha, self._sigma
        shrink = sigma[i + 1] / sigma[i]
        return float(shrink), float(alpha[i + 1] - alpha[i] * shrink)

    def _ratio(self, i: int) -> float:
        """The log-SNR distance of the step before i over that of step i."""
        return float((self._lambda[i] - self._lambda[i - 1]) / (self._lambda[i + 1] - self._lambda[i]))


class DPMSolverPlusPlus2M(_MultiStep):
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), its first and last steps of first order."""

    memory = 1

    def __init__(self, alphas_cumprod: np.ndarray, eta: float | str, prediction_type: str, clip: float | None) -> None:
        super().__init__(alphas_cumprod, eta, prediction_type, clip)
        rows = []
        for i in range(self.steps):
            a, b = self._first_order(i)
            second = 0.0 if i in (0, self.steps - 1) else 0.5 * b / self._ratio(i)
            rows.append((*self._prediction[i], a, b + second, -second))
        self.table = np.array(rows, dtype=np.float32)

    def start(self, x: Tensor) -> State:
        return x, x.new_zeros(x.shape)

    def combine(self, state: State, output: Any, row: Sequence[Any], noise: Any = None) -> State:
        x, previous = state
        from_sample, from_output, from_x, from_x0, from_previous = row
        x0 = _predict_x0(from_sample, from_output, x, output, self.clip)
        return from_x * x + from_x0 * x0 + from_previous * previous, x0


class DPMSolverPlusPlus3M(_MultiStep):
    """DPM-Solver++(3M): the third order of Lu et al. 2022b (appendix B.3) from the two x_0 before. The first and last steps are
    of first order, the second of second, and so is the last but one of fewer than 15, as in diffusers."""

    memory = 2

    def __init__(self, alphas_cumprod: np.ndarray, eta: float | str, prediction_type: str, clip: float | None) -> None:
        super().__init__(alphas_cumprod, eta, prediction_type, clip)
        rows = []
        for i in range(self.steps):
            order = min(i + 1, self.steps - i if self.steps < 15 or i == self.steps - 1 else 3, 3)
            a, b = self._first_order(i)
            # Of (x_0 at i) - (x_0 at i - 1) over its log-SNR distance, and of its change over that of the two.
            slope = bend = 0.0
            ratio, ratio_before = (self._ratio(i) if order > 1 else 1.0), 1.0
            if order == 2:
                slope = 0.5 * b
            elif order == 3:
                h = float(self._lambda[i + 1] - self._lambda[i])
                ratio_before = float((self._lambda[i - 1] - self._lambda[i - 2]) / h)
                alpha, shrink = float(self._alpha[i + 1]), np.expm1(-h)
                second, third = alpha * (shrink / h + 1), alpha * (0.5 - (shrink + h) / h**2)
                slope, bend = second, (second * ratio + third) / (ratio + ratio_before)
            newest, oldest = (slope + bend) / ratio, bend / ratio_before
            rows.append((*self._prediction[i], a, b + newest, -newest - oldest, oldest))
        self.table = np.array(rows, dtype=np.float32)

    def start(self, x: Tensor) -> State:
        return x, x.new_zeros(x.shape), x.new_zeros(x.shape)

    def combine(self, state: State, output: Any, row: Sequence[Any], noise: Any = None) -> State:
        x, previous, older = state
        from_sample, from_output, from_x, from_x0, from_previous, from_older = row
        x0 = _predict_x0(from_sample, from_output, x, output, self.clip)
        return from_x * x + from_x0 * x0 + from_previous * previous + from_older * older, x0, previous


class _Corrected(_MultiStep):
    """Solvers whose network evaluations also correct the step that led to them.

    A row holds the coefficients of: x_0, from x and the network's output; the corrected x, from the one before, from the x_0 of
    the step before and of the one before that, and from x_0; and the next x, from the corrected x, x_0 and the x_0 before.
    """

    memory = 3

    def start(self, x: Tensor) -> State:
        return x, x.clone(), x.new_zeros(x.shape), x.new_zeros(x.shape)

    def combine(self, state: State, output: Any, row: Sequence[Any], noise: Any = None) -> State:
        x, x_before, previous, older = state
        x0 = _predict_x0(row[0], row[1], x, output, self.clip)
        from_before, from_previous, from_older, from_x0 = row[2:6]
        x = from_before * x_before + from_previous * previous + from_older * older + from_x0 * x0
        from_x, from_x0, from_previous = row[6:]
        return from_x * x + from_x0 * x0 + from_previous * previous, x, x0, previous


class UniPC(_Corrected):
    """UniPC of second order with B(h) = e^h - 1 (Zhao et al. 2023, algorithms 5 and 8): each network evaluation also corrects
    the step that led to it. First and last predictions are of first order."""

    def __init__(self, alphas_cumprod: np.ndarray, eta: float | str, prediction_type: str, clip: float | None) -> None:
        super().__init__(alphas_cumprod, eta, prediction_type, clip)
        rows = []
        corrector = (1.0, 0.0, 0.0, 0.0)  # no step before the first: x is unchanged
        for i in range(self.steps):
            a, b = self._first_order(i)
            second_order = 0 < i < self.steps - 1
            ratio = self._ratio(i) if second_order else 1.0
            second = 0.5 * b / ratio if second_order else 0.0
            rows.append((*self._prediction[i], *corrector, a, b + second, -second))
            now, older = self._corrector_weights(i, ratio) if second_order else (0.5, 0.0)
            corrector = (a, b * (1 - now + older), -b * older, b * now)
        self.table = np.array(rows, dtype=np.float32)

    def _corrector_weights(self, i: int, ratio: float) -> tuple[float, float]:
        """The weights of (x_0 at i + 1) - (x_0 at i) and of (x_0 at i) - (x_0 at i - 1) in the corrector of step i: the two
        equations of UniPC's order conditions (eq. 9) solved by hand."""
        hh = float(self._lambda[i] - self._lambda[i + 1])
        phi_1 = np.expm1(hh)
        phi_2 = phi_1 / hh - 1
        phi_3 = phi_2 / hh - 0.5
        b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
        rho = (b_1 - b_2) / (1 + ratio)
        return float(b_1 - rho), float(rho / ratio)


class Heun(_Corrected):
    """Heun's method in sigma / alpha, of second order without memory (the deterministic sampler of Karras et al. 2022,
    algorithm 1): DDIM's step to a timestep, a network evaluation there that corrects it, and another one of the corrected x.
    The last step is DDIM's."""

    needs_distinct_timesteps = False  # each but the first is there twice: see network_timesteps

    def __init__(self, alphas_cumprod: np.ndarray, eta: float | str, prediction_type: str, clip: float | None) -> None:
        super().__init__(alphas_cumprod, eta, prediction_type, clip)
        if self.steps % 2 == 0 or np.any(alphas_cumprod[1:-1:2] != alphas_cumprod[2:-1:2]):
            raise ValueError("the heun solver evaluates the network twice at each timestep but the first")
        if np.any(np.diff(alphas_cumprod[::2]) <= 0):
            raise ValueError("the heun solver needs timesteps without repeats; choose another spacing")
        rows = [(*self._prediction[0], 1.0, 0.0, 0.0, 0.0, *self._first_order(0), 0.0)]
        for i in range(1, self.steps, 2):
            shrink, from_x0 = self._first_order(i - 1)
            half = 0.0  # without a signal there is no slope to correct with
            if alphas_cumprod[i - 1] > NO_SIGNAL:
                half = 0.5 * (self._alpha[i] - self._sigma[i - 1] / self._alpha[i - 1] * self._alpha[i] ** 2 / self._sigma[i])
            corrector = (shrink, from_x0 + half, 0.0, -half)
            rows.append((*self._prediction[i], *corrector, 1.0, 0.0, 0.0))
            rows.append((*self._prediction[i], 1.0, 0.0, 0.0, 0.0, *self._first_order(i + 1), 0.0))
        self.table = np.array(rows, dtype=np.float32)


class Fitted(_Corrected):
    """The steps of UniPC with coefficients and timesteps that :func:`ddim_fast.diffusion.fitting.fit_solver` fitted to a model.

    Args:
        coefficients: (S, 9), the rows of :class:`_Corrected`.
        clip: clip x_0 to [-r, r] at each step; None does not.
    """

    needs_distinct_timesteps = False

    def __init__(self, coefficients: Sequence[Sequence[float]] | np.ndarray, clip: float | None = None) -> None:
        self.table, self.clip = np.array(coefficients, dtype=np.float32), clip
        self._prediction = [tuple(row[:2]) for row in self.table.tolist()]


# The solver whose timesteps and coefficients come with the model.
FITTED = "fitted"

SOLVERS: dict[str, Any] = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "dpm-solver++": DPMSolverPlusPlus2M,
    "dpm-solver++3m": DPMSolverPlusPlus3M,
    "unipc": UniPC,
    "heun": Heun,
    FITTED: Fitted,
    "consistency": Consistency,
}


def network_timesteps(solver: str, timesteps: np.ndarray) -> np.ndarray:
    """The timesteps of a run's network evaluations: its own, but of ``heun`` each twice, except the first.

    Args:
        timesteps: (S,), falling.
    """
    return np.concatenate([timesteps[:1], np.repeat(timesteps[1:], 2)]) if solver == "heun" else timesteps


def _pairs(alphas_cumprod: np.ndarray) -> list[tuple[float, float]]:
    return list(pairwise(float(a) for a in alphas_cumprod))


def _predict_x0(from_sample: Any, from_output: Any, x: Any, output: Any, clip: float | None) -> Any:
    x0 = from_sample * x + from_output * output
    return x0 if clip is None else x0.clip(-clip, clip)
