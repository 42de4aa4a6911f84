"""Sounds from files, folders and Parquet, brought to a network's length."""

from __future__ import annotations

import glob
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import soundfile

from ..io.files import check_expansion, one_line, visible_files, warn_of_skipped
from ..models.audio import AudioConfig
from .collected import BadRecords
from .parquet import encoded, parquet_class_names, parquet_files, read_parquet

__all__ = ["SoundSet", "load_sounds"]

# Formats of libsndfile under the names that recorders use.
_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64"}

_REMEDY = "copy or download it again, or save it as WAV"


@dataclass
class SoundSet:
    """Sounds in memory.

    Attributes:
        waves: (N, length) float32 in [-1, 1].
        labels: N class names, or None where the data has none.
        places: the origin of each: its file, or the data set's file and a number.
        left_out: the records that could not be read: the place of each, and why.
    """

    waves: np.ndarray
    labels: list[str] | None
    places: list[str]
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.waves)


def load_sounds(spec: str, config: AudioConfig, convert: bool = False, max_bad: int = 0) -> SoundSet:
    """Read recordings as (length,) samples with the largest at ``config.peak``: longer ones are cropped to their middle,
    shorter ones are centred in silence.

    Args:
        spec: one of

            - a sound file (WAV, FLAC, OGG, MP3 and others of libsndfile), or a folder of them, in which other files are skipped
              with a warning; a file's label is its subfolder, such as "7" or "7/jackson";
            - a Parquet file, a pattern of them, or a folder with some (those named ``train*``, if any) or with
              ``data/train*``, in the Hugging Face Hub's layout: a column ``audio`` of encoded sounds, optionally ``label``, and
              with it ``speaker``. A label is then "LABEL/SPEAKER", by the names in the file's features, if any.
        convert: mix the channels of a recording down to one, and resample it to the model's rate (by soxr); without it, such
            recordings are refused.
        max_bad: the number of recordings that are left out because they cannot be read; one more is an error.

    Raises:
        FileNotFoundError: there is nothing at ``spec``.
        ValueError: it holds no sounds, damaged ones, or sounds of another rate or number of channels; the message names the
            file.
    """
    waves, labels, places, bad = [], [], [], BadRecords(max_bad)
    for name, data, label in _open(spec):
        try:
            wave, rate = _decode(name, encoded(name, data, "audio"), config.sample_rate, convert)
        except ValueError as error:
            bad.add(name, error)
            continue
        waves.append(_fit(_mono(name, wave, rate, config.sample_rate, convert), config))
        labels.append(label)
        places.append(name)
    if not waves:
        raise ValueError(f"no sounds in {spec!r}: files such as .wav or .flac are needed")
    named = [label for label in labels if label is not None]
    return SoundSet(np.stack(waves), named if len(named) == len(labels) else None, places, bad.found)


_Row = tuple[str, Any, str | None]  # place, encoded sound, label


def _open(spec: str) -> Iterator[_Row]:
    path = Path(spec)
    if path.is_dir():
        parquet = parquet_files(path)
        return _read_parquet(parquet) if parquet else _read_folder(path)
    if path.is_file() and path.suffix.lower() != ".parquet":
        return iter([(str(path), path.read_bytes(), None)])
    if matches := [Path(match) for match in ([spec] if path.is_file() else sorted(glob.glob(spec)))]:
        if not all(match.suffix.lower() == ".parquet" for match in matches):
            raise ValueError(f"{spec!r}: a pattern is for Parquet files, and it matches {matches[0]}; name a folder of sounds")
        return _read_parquet(matches)
    raise FileNotFoundError(f"no sounds at {spec!r}: not a folder, a sound file or a Parquet file")


def _read_folder(folder: Path) -> Iterator[_Row]:
    files = set(visible_files(folder))
    sounds = {path for path in files if path.suffix.lower() in _SUFFIXES}
    if sounds:  # otherwise an error follows
        warn_of_skipped(folder, files - sounds, "sounds")
    for path in sorted(sounds):
        inside = path.parent.relative_to(folder)
        yield str(path), path.read_bytes(), inside.as_posix() if inside.parts else None


def _read_parquet(paths: list[Path]) -> Iterator[_Row]:
    for path in paths:
        names = [parquet_class_names(path, (column,)) for column in ("label", "speaker")]
        for place, data, *values in read_parquet([path], ("audio",), ("label",), ("speaker",)):
            parts = [_class_name(place, *pair) for pair in zip(values, names, strict=True) if pair[0] is not None]
            yield place, data, "/".join(parts) if values[0] is not None else None


def _class_name(place: str, value: Any, names: list[str] | None) -> str:
    """A label or speaker as text: by its name if the file's features name the classes."""
    if names is None or type(value) is not int:
        return str(value)
    if not 0 <= value < len(names):
        raise ValueError(f"{place}: class {value} has no name; the file's features name 0 to {len(names) - 1}")
    return names[value]


class _Stream(io.BytesIO):
    """Bytes in which a seek before the start, as damaged files cause it, does nothing: soundfile would print a traceback of its
    error."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _decode(name: str, data: bytes, rate: int, convert: bool) -> tuple[np.ndarray, int]:
    """(samples, channels) float32, and the sample rate; ``rate`` is the one that they will be converted to."""
    try:
        with soundfile.SoundFile(_Stream(data)) as sound:
            actual = sound.samplerate
            samples = sound.frames * max(sound.channels, rate / actual if convert else 1)
            check_expansion(len(data), 4 * samples, usual=1000)  # Opus at its lowest rate expands 200 times
            wave = sound.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name}: not a readable sound ({error.error_string}); {_REMEDY}") from None
    except Exception as error:  # soundfile raises other errors for a damaged header
        raise ValueError(f"{name}: not a readable sound ({one_line(error)}); {_REMEDY}") from None
    if not len(wave):
        raise ValueError(f"{name}: the sound is empty; remove the file or record it again")
    if not (np.abs(wave) < 1e30).all():  # larger samples overflow once they are mixed and resampled
        raise ValueError(f"{name}: some samples are NaN, infinite or too large; convert the file again")
    return wave, actual


def _mono(name: str, wave: np.ndarray, actual: int, rate: int, convert: bool) -> np.ndarray:
    """(samples,) float32 at ``rate``, from (samples, channels) at the rate ``actual``."""
    if not convert and wave.shape[1] != 1:
        raise ValueError(f"{name} has {wave.shape[1]} channels, the model's sounds have one; --convert mixes them down")
    if not convert and actual != rate:
        raise ValueError(f"{name} has {actual} samples a second, the model's sounds have {rate}; --convert resamples it")
    return librosa.resample(wave.mean(axis=1), orig_sr=actual, target_sr=rate)


def _fit(wave: np.ndarray, config: AudioConfig) -> np.ndarray:
    """(length,) from any number of samples."""
    start = max(0, len(wave) - config.length) // 2
    wave = librosa.util.pad_center(wave[start : start + config.length], size=config.length)
    largest = np.abs(wave).max()
    return wave * (config.peak / largest) if largest > 0 else wave
