"""The former name of :mod:`ddim_fast.io.pictures`, which version 0.3 drops."""

import warnings

from .io.pictures import *  # noqa: F403

warnings.warn("ddim_fast.media is now ddim_fast.io.pictures", FutureWarning, stacklevel=2)
