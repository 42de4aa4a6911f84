"""The former name of :mod:`ddim_fast.diffusion.degradations`, which version 0.3 drops."""

import warnings

from ..diffusion.degradations import *  # noqa: F403

warnings.warn("ddim_fast.diffusion.operators is now ddim_fast.diffusion.degradations", FutureWarning, stacklevel=2)
