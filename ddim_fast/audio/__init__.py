"""Sounds as a network's images: spectrograms and waveforms, read from and written to files. Needs librosa and soundfile."""

import importlib.util

for _name in ("librosa", "soundfile"):
    if importlib.util.find_spec(_name) is None:
        raise ModuleNotFoundError(f"sounds need {_name}: pip install 'ddim_fast[audio]'")
