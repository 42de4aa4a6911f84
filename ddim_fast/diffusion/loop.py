"""The sampling loop: in each step the denoiser predicts and the solver moves to the next timestep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..engine import Engine, inference, make_engine
from ..io.progress import tell
from ..ops.noise import INITIAL_NOISE, seeded_noise
from ..ops.scalars import is_whole
from .denoiser import Conditions, Denoiser, Prepared
from .guidance import ClassifierGuidance
from .request import Request, as_tensor
from .solvers import Solver, State, StepFunction
from .trajectory import SamplerState

__all__ = ["Inputs", "Loop", "Run", "calibrate", "initial_noise"]

F = TypeVar("F", bound=StepFunction)


class Inputs(NamedTuple):
    """The tensors of a run, on its device.

    Attributes:
        x: (N, ...) float32, the sample before the first step.
        conditions: the denoiser's conditions.
        table: (S, ...) float32, the solver's coefficients.
        steps: (S,) int64, 0 to S - 1.
        ages: (S,) float32, how far each step is from the last one that computed the deep features, as a part of ``reuse``.
        seeds: (N,) int64 of stochastic sampling, or None.
    """

    x: Tensor
    conditions: Conditions
    table: Tensor
    steps: Tensor
    ages: Tensor
    seeds: Tensor | None


class Run(NamedTuple):
    """A batch to sample: its tensors, the numbers of its unguided steps, and classifier guidance."""

    inputs: Inputs
    unguided: tuple[int, ...] = ()
    correction: ClassifierGuidance | None = None


class Loop(Generic[F]):
    """Steps of one denoiser and one solver, executed by an engine.

    Args:
        engine: executes the steps.
        reuse: the network computes its deep features in every ``reuse``-th step; 1 is every step. In between they are
            extrapolated linearly in the step's number (as in Liu et al. 2025, arXiv 2503.06923, of first order). Unchanged
            features lag behind: with them the packaged fashion-mnist did worse than with fewer steps in the same time.

    Raises:
        ValueError: ``reuse`` is not a whole number from 1, or the network has no features to share.
    """

    def __init__(self, denoiser: Denoiser, solver: F, engine: Engine, reuse: int = 1) -> None:
        if not is_whole(reuse) or reuse < 1:
            raise ValueError(f"reuse must be a whole number of steps, 1 or more; got {reuse!r}")
        if reuse > 1 and not denoiser.has_deep_features:
            raise ValueError(
                f"reuse={reuse} needs a network with the methods condition and denoise_reusing, as ddim_fast.UNet has them; "
                "this one can only be sampled with reuse=1"
            )
        self.denoiser, self.solver, self.engine, self.reuse = denoiser, solver, engine, reuse

    def request(self, x_T: Any = None, **asked: Any) -> Request:
        """The arguments of :meth:`ddim_fast.Sampler.sample`, checked, as tensors on the device.

        Raises:
            ValueError: they do not fit each other, the network, the solver or the engine; the message names the argument.
        """
        if asked.get("gradient") is not None and self.engine.runs_whole:
            raise ValueError(
                "gradient is called between the steps of a run, which a captured run does not allow; use engine eager or "
                "compiled"
            )
        denoiser, x_T = self.denoiser, None if x_T is None else as_tensor(x_T)
        has_guide = denoiser.guide is not None
        request = Request.check(denoiser.config, stochastic=self.solver.stochastic, has_guide=has_guide, x_T=x_T, **asked)
        leaves_out = request.guidance_interval is not None or (isinstance(request.guidance, tuple) and 1 in request.guidance)
        if leaves_out and self.reuse > 1 and not has_guide:
            raise ValueError(
                "guidance_interval, and a scale of 1 for some steps, change the network's batch between steps; use reuse=1, "
                f"not {self.reuse}"
            )
        return request.to(denoiser.device)

    def prepare(self, request: Request, timesteps: np.ndarray, table: np.ndarray, x: Tensor | None = None) -> Run:
        """Prepare a run before its first step.

        Args:
            request: as tensors.
            timesteps: (S,) timesteps of the network evaluations.
            table: the solver's coefficients.
            x: the starting sample; None is the request's.
        """
        device = self.denoiser.device
        prepared: Prepared = self.denoiser.prepare(
            timesteps, request.labels, request.guidance, request.guidance_interval, request.gradient, self.solver.clip
        )
        steps = torch.arange(len(timesteps), device=device)
        inputs = Inputs(
            initial_noise(request, self.denoiser) if x is None else x,
            prepared.conditions,
            torch.from_numpy(table).to(device),
            steps,
            steps % self.reuse / self.reuse,
            request.seeds if self.solver.stochastic else None,
        )
        return Run(inputs, prepared.unguided, prepared.correction)

    def last(self, run: Run) -> Tensor:
        """The sample after the last step."""
        return self.engine.run(self._last, run.inputs, run[1:])

    def states(self, engine: Engine, run: Run) -> Iterator[tuple[State, Tensor]]:
        """The state after each step, and the denoiser's output in that step."""
        inputs, deep = run.inputs, None
        state = self.solver.start(inputs.x)
        unguided = inputs._replace(conditions=inputs.conditions.unguided()) if run.unguided else inputs
        indices = inputs.steps.unbind()
        for number, index in enumerate(indices):
            renews = number % self.reuse == 0
            arguments = (unguided if number in run.unguided else inputs, index, None if renews else deep)
            if run.correction is None:
                state, output, features = engine.call(self.step, state, *arguments)
            else:
                output, features = engine.call(self._predict, state[0], *arguments)
                output = run.correction(state[0], output, index)
                state = self.solver.step(state, output, inputs.table, index, inputs.seeds)
            if renews and features is not None:
                # Their change is unknown at first.
                deep = features, torch.zeros_like(features) if deep is None else features - deep[0]
            tell(len(inputs.x) / len(indices))
            yield state, output

    @inference()
    def sample(
        self: Loop[Solver], request: Request, timesteps: np.ndarray, on_step: Callable[[SamplerState], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The images of a request, and (N,) int64 network evaluations of each, by a solver with its own table; arguments as of
        :meth:`prepare`. ``on_step`` is called with the state after each step."""
        if on_step is None:
            images = self.last(self.prepare(request, timesteps, self.solver.table))
        else:
            for state in self.trajectory(request, timesteps):
                on_step(state)
            images = state.x
        evaluations = self.denoiser.evaluations(timesteps, request.guidance, request.guidance_interval)
        return images, torch.full((len(request),), evaluations)

    @inference()
    def trajectory(self: Loop[Solver], request: Request, timesteps: np.ndarray) -> Iterator[SamplerState]:
        """The state after each step of such a solver."""
        run = self.prepare(request, timesteps, self.solver.table)
        before = run.inputs.x
        for i, (state, output) in enumerate(self.states(self.engine, run)):
            yield SamplerState(i, timesteps[i].item(), state[0], (self.solver, before, output))
            before = state[0]

    def step(
        self, state: State, inputs: Inputs, index: Tensor, deep: tuple[Tensor, Tensor] | None = None
    ) -> tuple[State, Tensor, Tensor | None]:
        """One step, from the state before it.

        Args:
            index: () int64, the number of the step.
            deep: the deep features of the last step that computed them, and their change since the one before that; None
                computes them.

        Returns:
            The state after it, the denoiser's output, and its deep features if later steps use them.
        """
        output, features = self._predict(state[0], inputs, index, deep)
        return self.solver.step(state, output, inputs.table, index, inputs.seeds), output, features

    def _predict(
        self, x: Tensor, inputs: Inputs, index: Tensor, deep: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.reuse == 1:
            return self.denoiser(x, inputs.conditions, index)[0], None
        if deep is None:
            return self.denoiser(x, inputs.conditions, index)
        features, change = deep
        age = inputs.ages.index_select(0, index.reshape(1))[0]
        extrapolated = torch.addcmul(features, change, age.to(change.dtype))
        return self.denoiser(x, inputs.conditions, index, extrapolated)

    def _last(self, engine: Engine, inputs: Inputs, plan: tuple[tuple[int, ...], ClassifierGuidance | None]) -> Tensor:
        x = inputs.x
        for state, _ in self.states(engine, Run(inputs, *plan)):
            x = state[0]
        return x


def initial_noise(request: Request, denoiser: Denoiser) -> Tensor:
    """(N, C, H, W) float32: the request's x_T, or the noise of its seeds."""
    if request.x_T is not None:
        return request.x_T
    return seeded_noise(request.seeds, INITIAL_NOISE, denoiser.config.image_shape, denoiser.device)


@inference()
def calibrate(denoiser: Denoiser, solver: Solver, timesteps: np.ndarray) -> None:
    """Calibrate a denoiser's 8-bit convolutions, unless they are, by sampling a few images of all classes, from seeds outside
    the usual range."""
    if not denoiser.needs_calibration:
        return
    classes, seeds = denoiser.config.num_classes, np.arange(2**62, 2**62 + 8)
    loop = Loop(denoiser, solver, make_engine("eager", denoiser.device))
    request = Request(seeds, labels=None if classes is None else np.arange(8) * classes // 7).to(denoiser.device)
    denoiser.calibrate(lambda: loop.sample(request, timesteps))
