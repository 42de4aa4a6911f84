"""How many images a second a training step gets from a memory-mapped file: random ones are gathered and become float32, as in
ddim_fast/training/loop.py.

    python benchmarks/data_loading.py [--images N] [--batch-size N] [--threads N] [--seconds S]

prints JSON. Divide by --threads for a core's rate, and compare with the images_per_s of a run's stats.jsonl. The file has been
written just before, so it is in the page cache as far as memory goes; with --images beyond memory the disk is measured too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine
from torch import Tensor

from ddim_fast.data.images import to_unit_range

SIZES = (32, 64)

# Images that are written at once.
_PART = 1024


def write_images(path: Path, count: int, size: int) -> Tensor:
    """(count, 3, size, size) uint8 at random, mapped read-only from ``path``."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, count, _PART):
            file.write(random.bytes(min(_PART, count - start) * 3 * size * size))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.memmap(path, np.uint8, "r", shape=(count, 3, size, size)))


def rate(images: Tensor, batch_size: int, seconds: float) -> float:
    """Images a second in batches of random ones, which are checked first."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(images), (batch_size,), generator=generator)
    expected = torch.stack([images[i].clone() for i in index.tolist()]).float() / 127.5 - 1
    torch.testing.assert_close(to_unit_range(images[index]), expected, atol=1e-6, rtol=0)
    batches, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        to_unit_range(images[torch.randint(len(images), (batch_size,), generator=generator)])
        batches += 1
    return batches * batch_size / (time.perf_counter() - begun)


def measure(count: int, batch_size: int, threads: int, seconds: float) -> dict[str, Any]:
    """The rates of all sizes."""
    torch.set_num_threads(threads)
    rates = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            rates[f"{size}x{size}"] = rate(write_images(Path(folder) / "images.u8", count, size), batch_size, seconds)
    return {
        "machine": machine(),
        "images": count,
        "batch_size": batch_size,
        "threads": threads,
        "images_per_s": {name: round(value) for name, value in rates.items()},
        "images_per_s_per_core": {name: round(value / threads) for name, value in rates.items()},
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=50_000)
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seconds", type=float, default=5.0)
    arguments = p.parse_args()
    print(json.dumps(measure(arguments.images, arguments.batch_size, arguments.threads, arguments.seconds), indent=2))


if __name__ == "__main__":
    main()
