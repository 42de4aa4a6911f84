"""The noise schedule: the share of signal at each training timestep. NumPy and float64; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..models.config import BETA_SCHEDULES, UNetConfig

__all__ = ["BETA_SCHEDULES", "NoiseSchedule"]


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """q(x_t | x_0) = N(sqrt(alphas_cumprod[t]) x_0, 1 - alphas_cumprod[t]) (Ho et al. 2020, eq. 4).

    The betas are float32 numbers, computed in the published code's order of operations, because published networks were trained
    on exactly these; derived values are float64. ``alphas_cumprod.astype(np.float32)`` equals the linear, scaled_linear and
    cosine schedules of diffusers bit for bit. The sigmoid and the zero-SNR rescaling equal diffusers' to the last digit but
    one: torch's own sigmoid and square root are not correctly rounded, and vary between machines.

    Attributes:
        betas: (T,) float64 array of float32 values in [0, 1].
    """

    betas: np.ndarray
    _alphas_cumprod: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float32).astype(np.float64)
        if betas.ndim != 1 or betas.size == 0:
            raise ValueError(f"betas must be a non-empty list of numbers; got shape {betas.shape}")
        if not (np.all(betas >= 0) and np.all(betas <= 1)):
            raise ValueError("betas must all lie in [0, 1]")
        if np.any(betas[:-1] == 1):
            raise ValueError("only the last beta may be 1: no signal is left after it")
        betas.setflags(write=False)
        object.__setattr__(self, "betas", betas)
        # 1 - beta is rounded to float32 and the product is not: what torch.cumprod does inside.
        alphas_cumprod = np.cumprod((np.float32(1) - betas.astype(np.float32)).astype(np.float64))
        alphas_cumprod.setflags(write=False)
        object.__setattr__(self, "_alphas_cumprod", alphas_cumprod)

    def __repr__(self) -> str:
        first, last = self.betas[0], self.betas[-1]
        end = self.alphas_cumprod[-1]
        return f"NoiseSchedule({len(self.betas)} timesteps, betas {first:.3g} to {last:.3g}, last alphas_cumprod {end:.3g})"

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """(T,) float64: the share of the signal's variance left at each timestep."""
        return self._alphas_cumprod

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    def levels(self, timesteps: np.ndarray) -> np.ndarray:
        """(S + 1,) float64, alphas_cumprod at the timesteps of a run and after its last step, where no noise is left. Between
        training timesteps the log signal-to-noise ratio is interpolated."""
        if np.issubdtype(timesteps.dtype, np.integer):
            return np.append(self.alphas_cumprod[timesteps], 1.0)
        log_snr = np.interp(timesteps, np.arange(self.num_train_timesteps), self.log_snr)
        return np.append(1 / (1 + np.exp(-log_snr)), 1.0)

    @property
    def log_snr(self) -> np.ndarray:
        """(T,) float64: log(alphas_cumprod / (1 - alphas_cumprod)); -inf at a zero-SNR terminal step."""
        with np.errstate(divide="ignore"):
            return np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod)

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_train_timesteps: int = 1000) -> NoiseSchedule:
        """Betas linear in t (Ho et al. 2020, section 4)."""
        _check_range(beta_start, beta_end)
        return cls(_linspace(beta_start, beta_end, _check_length(num_train_timesteps)))

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = 1000
    ) -> NoiseSchedule:
        """sqrt(beta) linear in t (Rombach et al. 2022, the schedule of Stable Diffusion)."""
        _check_range(beta_start, beta_end)
        return cls(_linspace(beta_start**0.5, beta_end**0.5, _check_length(num_train_timesteps)) ** 2)

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, *, max_beta: float = 0.999) -> NoiseSchedule:
        """alphas_cumprod(t) = cos^2((t/T + 0.008) / 1.008 * pi/2), betas capped at ``max_beta`` (Nichol and Dhariwal 2021,
        eq. 17).

        diffusers calls it ``squaredcos_cap_v2``."""
        steps = _check_length(num_train_timesteps)
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return cls(np.array([min(1 - bar[i + 1] / bar[i], max_beta) for i in range(steps)]))

    @classmethod
    def sigmoid(cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_train_timesteps: int = 1000) -> NoiseSchedule:
        """Betas on a sigmoid over [-6, 6] (the schedule of GeoDiff, Xu et al. 2022)."""
        _check_range(beta_start, beta_end)
        ramp = _linspace(-6.0, 6.0, _check_length(num_train_timesteps)).astype(np.float64)
        unit = 1 / (1 + np.exp(-ramp).astype(np.float32))
        return cls(unit * np.float32(beta_end - beta_start) + np.float32(beta_start))

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray) -> NoiseSchedule:
        """The schedule of a list of betas, one a timestep."""
        return cls(np.asarray(betas))

    @classmethod
    def from_name(
        cls, name: str, beta_start: float = 1e-4, beta_end: float = 0.02, num_train_timesteps: int = 1000
    ) -> NoiseSchedule:
        """The schedule ``linear``, ``scaled_linear``, ``cosine`` or ``sigmoid``; the cosine has no start and end.

        Raises:
            ValueError: there is no schedule of that name.
        """
        if name not in BETA_SCHEDULES:
            raise ValueError(f"unknown beta_schedule {name!r}; there are {', '.join(BETA_SCHEDULES)}")
        if name == "cosine":
            return cls.cosine(num_train_timesteps)
        return getattr(cls, name)(beta_start, beta_end, num_train_timesteps)

    @classmethod
    def from_config(cls, config: UNetConfig) -> NoiseSchedule:
        """The schedule of a network's training."""
        schedule = cls.from_name(config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps)
        return schedule.rescale_zero_terminal_snr() if config.rescale_betas_zero_snr else schedule

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """The schedule shifted and scaled to zero signal at t = T - 1 (Lin et al. 2024, algorithm 1).

        Needs a network that predicts v or the sample: at pure noise, epsilon does not determine the image.

        Raises:
            ValueError: the signal does not fall from timestep to timestep, so it cannot be scaled.
        """
        root = np.sqrt(self.alphas_cumprod.astype(np.float32))
        root_first, root_last = root[0], root[-1]
        if np.any(root[:-1] <= root_last):
            raise ValueError(
                "zero terminal SNR needs a schedule whose alphas_cumprod falls, and is above its last value, at all timesteps "
                f"before that; got {self.alphas_cumprod[0]:g} to {self.alphas_cumprod[-1]:g} in {len(root)} timesteps"
            )
        if len(root) < 2:
            raise ValueError("zero terminal SNR needs 2 timesteps or more; got 1")
        root = (root - root_last) * (root_first / (root_first - root_last))
        bar = root**2
        alphas = np.concatenate([bar[:1], bar[1:] / bar[:-1]])
        return NoiseSchedule(np.float32(1) - alphas)


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    """float32 points from both ends inwards, each rounded once, as torch.linspace, which made the published schedules."""
    first, last = np.float64(np.float32(start)), np.float64(np.float32(end))
    if count == 1:
        return np.array([first], dtype=np.float32)
    step = np.float64((np.float32(end) - np.float32(start)) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)


def _check_range(beta_start: float, beta_end: float) -> None:
    if not (0 < beta_start < 1 and 0 < beta_end < 1):
        raise ValueError(f"beta_start and beta_end must lie between 0 and 1; got {beta_start} and {beta_end}")


def _check_length(num_train_timesteps: int) -> int:
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1; got {num_train_timesteps}")
    return num_train_timesteps
