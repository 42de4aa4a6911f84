"""The former name of :mod:`ddim_fast.data.sound_files`, which version 0.3 drops."""

import warnings

from ..data.sound_files import *  # noqa: F403

warnings.warn("ddim_fast.audio.reading is now ddim_fast.data.sound_files", FutureWarning, stacklevel=2)
