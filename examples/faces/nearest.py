"""Does a model copy its data? ``python examples/faces/nearest.py MODEL TRAIN HELD_OUT INCEPTION OUT.png``.

OUT.png shows sixteen samples, seeds 0 to 15, and below each the picture in TRAIN whose features are nearest to those of
the sample or of its mirror image. Printed are the distances, beside those from the pictures in HELD_OUT, which cannot
be copies: a model that copies is much nearer than they are.
"""

import sys
from pathlib import Path

import torch

from ddim_fast import Sampler, UNet
from ddim_fast.data.images import load_images, to_unit_range
from ddim_fast.evaluation.inception import load_inception
from ddim_fast.evaluation.reference import load_reference
from ddim_fast.io.pictures import image_grid, save_image, to_uint8
from ddim_fast.io.processes import Processes


def main(model: str, train: str, held_out: str, inception: str, out: str) -> None:
    unet, network = UNet.from_pretrained(model), load_inception(Path(inception))
    samples = Sampler(unet, solver="unipc", steps=10).sample(seeds=range(16))
    pictures = torch.from_numpy(to_uint8(samples)).permute(0, 3, 1, 2)
    with Processes() as processes:  # features of data sets are kept in the user's cache folder
        known = load_reference(train, unet.config.image_shape, network, processes).features
        unseen = load_reference(held_out, unet.config.image_shape, network, processes).features
    distances, nearest = torch.stack([torch.cdist(network.of(p), known) for p in (pictures, pictures.flip(3))]).amin(0).min(1)
    for name, found in (("samples", distances), ("held-out pictures", torch.cdist(unseen, known).amin(1))):
        print(f"distance to the nearest training picture, {name}: median {found.median():.2f}, least {found.min():.2f}")
    copied = to_unit_range(load_images(train, *unet.config.image_shape[:2]).images[nearest])
    rows = [half for eight in zip(samples.split(8), copied.split(8), strict=True) for half in eight]
    save_image(Path(out), image_grid(torch.cat(rows), columns=8), scale=max(1, 128 // unet.config.size[0]))


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    main(*sys.argv[1:])
