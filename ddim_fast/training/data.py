"""The former name of :mod:`ddim_fast.data.images`, which version 0.3 drops."""

import warnings

from ..data.images import *  # noqa: F403

warnings.warn("ddim_fast.training.data is now ddim_fast.data.images", FutureWarning, stacklevel=2)
