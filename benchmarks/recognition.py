"""A small classifier of spectrograms: whether a generated sound is heard as what it should be."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Recogniser", "train_recogniser"]


class Recogniser(nn.Module):
    """Four convolutions and an average over time.

    Args:
        classes: how many there are.
        mels: bands of the spectrograms; a multiple of 16.
    """

    def __init__(self, classes: int, mels: int = 64) -> None:
        super().__init__()
        widths = (1, 16, 32, 64, 64)
        self.features = nn.Sequential(*(layer for a, b in pairwise(widths) for layer in _block(a, b)))
        self.classify = nn.Sequential(nn.Dropout(0.5), nn.Linear(widths[-1] * mels // 16, classes))

    def forward(self, spectrograms: Tensor) -> Tensor:
        """(N, 1, mels, frames) in [-1, 1] -> (N, classes) logits."""
        return self.classify(self.features(spectrograms).amax(3).flatten(1))


def _block(channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def train_recogniser(spectrograms: Tensor, labels: Tensor, *, steps: int, batch_size: int = 64, seed: int = 0) -> Recogniser:
    """A recogniser of ``labels``, in eval mode.

    Voices differ in pitch, in level and in when they begin: each batch is moved along both axes, and its sounds made louder or
    softer.

    Args:
        spectrograms: (N, 1, mels, frames) in [-1, 1].
        labels: (N,) int64, from 0.
    """
    torch.manual_seed(seed)
    model = Recogniser(int(labels.max()) + 1, spectrograms.shape[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for index in _batches(len(labels), batch_size, steps):
        loss = F.cross_entropy(model(_varied(spectrograms[index])), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _batches(count: int, size: int, steps: int) -> Iterator[Tensor]:
    for _ in range(steps):
        yield torch.randint(count, (size,))


def _varied(spectrograms: Tensor) -> Tensor:
    """The batch moved by up to 3 bands and 8 frames, and by up to a seventh of the range of levels."""
    bands, frames = int(torch.randint(-3, 4, ())), int(torch.randint(-8, 9, ()))
    gain = 0.3 * (torch.rand(len(spectrograms), 1, 1, 1) - 0.5)
    return (spectrograms.roll((bands, frames), (2, 3)) + gain).clamp(-1, 1)
