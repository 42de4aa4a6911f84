"""Split the faces of CelebA by person: ``python examples/faces/split.py FACES SIZE OUT``.

FACES are the 5,999 pictures as one Parquet file (or whatever else ``ddim_fast.train --data`` takes, in that order).
OUT/held-out gets those of 20 people, whose numbers stand in held-out.txt, OUT/train all others; each as SIZE x SIZE
pixels, as a network is given them.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ddim_fast.data.images import read_images
from ddim_fast.data.resizing import fit_image

PICTURES = 5999


def main(faces: str, size: str, out: str) -> None:
    held_out = set(map(int, Path(__file__).with_name("held-out.txt").read_text().split()))
    pictures = [image for _, image, _ in read_images(faces)]
    if len(pictures) != PICTURES:
        sys.exit(f"{faces} holds {len(pictures)} pictures; held-out.txt is about {PICTURES}")
    for part in ("train", "held-out"):
        (Path(out) / part).mkdir(parents=True)
    for number, picture in enumerate(pictures):
        pixels = np.moveaxis(fit_image(picture, 3, int(size)), 0, 2)
        part = "held-out" if number in held_out else "train"
        Image.fromarray(pixels).save(Path(out) / part / f"{number:04d}.png")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
