"""The conversion of sounds to a network's images, stored as audio.json beside config.json."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from .config import UNetConfig
from .json_dataclass import JsonDataclass

__all__ = ["AudioConfig"]

KINDS = ("mel", "waveform")


@dataclass(frozen=True, kw_only=True)
class AudioConfig(JsonDataclass):
    """The conversion between sounds and a network's images.

    Sound:
        kind: ``mel`` for images that are log-mel spectrograms; ``waveform`` for the sound itself.
        sample_rate: samples per second, of one channel.
        length: samples per sound; a multiple of ``hop``.
        fold: the values stacked in the channels: ``fold`` x ``fold`` patches of a spectrogram, ``fold`` consecutive samples of
            a waveform. A network with fewer, wider positions costs less.
        peak: the largest value of a recording after reading; its level is scaled to it, since levels of recordings are
            arbitrary.

    Spectrogram, also for the loudness and picture of a waveform:
        n_fft: samples per frame, under a Hann window.
        hop: samples from frame to frame. The ``length / hop`` frames are centred in the sound.
        mels: bands of the mel scale (Slaney's), from 0 Hz to half the sample rate.
        floor_db, ceiling_db: the band powers that map to -1 and 1, in decibels; the bands of a frame add up to its mean square.

    Raises:
        ValueError: a field has an impossible value; the message names the field.
    """

    kind: str
    sample_rate: int
    length: int
    fold: int
    peak: float = 0.5
    n_fft: int = 512
    hop: int = 128
    mels: int = 64
    floor_db: float = -80.0
    ceiling_db: float = -10.0

    # The network's configuration, for the former names below. It is not a field.
    _network = cast("UNetConfig | None", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.kind in KINDS, "kind", f"one of {', '.join(KINDS)}")
        self._require_positive("sample_rate", "length", "fold", "hop", "mels")
        self._require(0 < self.peak <= 1, "peak", "in (0, 1]")
        self._require(self.n_fft >= self.hop and (self.n_fft - self.hop) % 2 == 0, "n_fft", "hop and an even number more")
        self._require(self.length % self.hop == 0, "length", f"a multiple of hop, {self.hop}")
        self._require(self.floor_db < self.ceiling_db, "floor_db", f"below ceiling_db, {self.ceiling_db}")
        folded = {"mel": (self.mels, self.frames), "waveform": (self.length,)}[self.kind]
        divisible = all(size % self.fold == 0 for size in folded)
        self._require(divisible, "fold", f"a divisor of {' and '.join(map(str, folded))}")

    @property
    def frames(self) -> int:
        """Frames of the spectrogram."""
        return self.length // self.hop

    @property
    def margin(self) -> int:
        """Samples of silence at either end of a sound, so that frames are centred in it."""
        return (self.n_fft - self.hop) // 2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the network's images."""
        if self.kind == "mel":
            return (self.fold**2, self.mels // self.fold, self.frames // self.fold)
        return (self.fold, 1, self.length // self.fold)

    @classmethod
    def preset(cls, name: str) -> AudioConfig | None:
        """The sound format of a network preset (:meth:`UNetConfig.preset`), or None for a preset of images."""
        return cls(**_PRESETS[name]) if name in _PRESETS else None

    @property
    def labels(self) -> Sequence[str] | None:
        """The former name of :attr:`UNetConfig.class_names`, which version 0.3 drops."""
        warnings.warn("model.audio.labels is now model.config.class_names", FutureWarning, stacklevel=2)
        return None if self._network is None else self._network.class_names

    def class_numbers(self, name: str) -> list[int]:
        """The former name of :meth:`UNetConfig.class_numbers`, which version 0.3 drops."""
        instead = "model.audio.class_numbers is now model.config.class_numbers"
        warnings.warn(instead, FutureWarning, stacklevel=2)
        if self._network is None:
            raise ValueError(f"{instead}, which knows the classes' names")
        return self._network.class_numbers(name)


_PRESETS: dict[str, dict[str, Any]] = {
    "digits-mel": {"kind": "mel", "sample_rate": 8000, "length": 8192, "fold": 4},
    "digits-waveform": {"kind": "waveform", "sample_rate": 8000, "length": 8192, "fold": 16, "peak": 1.0},
}
