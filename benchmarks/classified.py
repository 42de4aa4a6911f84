"""Are guided samples what was asked for? A small classifier is trained on the data that the model was trained on, and asked
what real test images are and what samples of every class are.

    python benchmarks/classified.py --data fashion-mnist/ --test fashion-mnist/t10k-images-idx3-ubyte.gz --out classified.json

Prints a markdown table, a row a guidance scale, and writes its figures. A scale above 1 at which fewer samples are recognised
than test images, by more than ALLOWED, is an error. --gradients adds rows of samples that a second classifier guides, and
--swap 7 9 a table of how many test images of class 7 are taken for class 9 once they have been swapped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim_fast import Sampler, UNet
from ddim_fast.data.images import ImageSet, load_images, to_unit_range
from ddim_fast.diffusion.editing import swap_class
from ddim_fast.diffusion.guidance import likelihood_gradient
from ddim_fast.io.files import atomic_write

__all__ = ["Classifier", "measure_swaps", "recognised", "sample_towards", "train_classifier"]

ALLOWED = 0.10
STRENGTHS = (0.4, 0.6, 0.8, 1.0)


class Classifier(nn.Sequential):
    """Two convolutions and two linear layers: (N, channels, size, size) in [-1, 1] -> (N, classes)."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * (size // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, classes)),
        )


def train_classifier(data: ImageSet, classes: int, epochs: int = 3, batch_size: int = 128, seed: int = 0) -> Classifier:
    """Adam with a cosine to zero; the same seed gives the same classifier on the same machine."""
    torch.manual_seed(seed)
    classifier = Classifier(data.images.shape[1], data.images.shape[2], classes).to(memory_format=torch.channels_last)
    steps = epochs * (len(data) // batch_size)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step % (len(data) // batch_size) == 0:
            order = torch.randperm(len(data))
        picked, order = order[:batch_size], order[batch_size:]
        loss = F.cross_entropy(classifier(to_unit_range(data.images[picked])), data.labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return classifier.eval()


@torch.no_grad()
def recognised(classifier: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(classes,): which share of the images of each class, in [-1, 1], is taken for what its label says."""
    right = torch.cat([classifier(part).argmax(1) for part in images.clamp(-1, 1).split(500)]) == labels
    return torch.stack([right[labels == c].double().mean() for c in range(classes)])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="what the model was trained on, with labels")
    p.add_argument("--test", required=True, help="images that it was not trained on, with labels")
    p.add_argument("--model", default="fashion-mnist")
    p.add_argument("--scales", type=float, nargs="*", default=[1.0, 1.5, 2.0, 3.0], help="of guidance; 1 is none")
    p.add_argument("--interval", type=int, nargs=2, help="guidance interval, in timesteps")
    p.add_argument(
        "--gradients", type=float, nargs="*", default=[], help="scales of guidance by a second classifier, without labels"
    )
    p.add_argument("--swap", type=int, nargs=2, metavar=("FROM", "TO"), help="classes to swap, with guidance 2")
    p.add_argument("--per-class", type=int, default=100, help="samples a class")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--out", type=Path, help="a JSON file")
    arguments = p.parse_args()

    model = UNet.from_pretrained(arguments.model)
    config, classes = model.config, model.config.num_classes
    data, test = (load_images(spec, config.in_channels, config.sample_size) for spec in (arguments.data, arguments.test))
    classifier = train_classifier(data, classes)
    figures: dict[str, dict[str, list[float]]] = {"recognised": {}, "swapped": {}}
    print(f"| images | all | {' | '.join(map(str, range(classes)))} |\n|---|---|{'---|' * classes}")

    def row(name: str, images: Tensor, labels: Tensor) -> float:
        shares = recognised(classifier, images, labels, classes)
        print(f"| {name} | {' | '.join(f'{100 * s:.1f}' for s in [shares.mean(), *shares])} |", flush=True)
        figures["recognised"][name] = shares.tolist()
        return shares.mean().item()

    enough = row(f"{len(test)} test images", to_unit_range(test.images), test.labels) - ALLOWED
    sampler = Sampler(model, steps=arguments.steps, dtype=getattr(torch, arguments.dtype))
    seeds = range(classes * arguments.per_class)
    labels = torch.tensor([seed % classes for seed in seeds])
    too_few = []
    for scale in arguments.scales:
        where = {"guidance_interval": arguments.interval} if scale != 1 else {}
        images = sampler.sample(seeds=seeds, labels=labels, guidance=scale, **where).cpu()
        name = f"{len(seeds)} samples, guidance {scale:g}, {sampler.evaluations[0]} evaluations each"
        if row(name, images, labels) < enough and scale > 1:
            too_few.append(f"{scale:g}")
    other = train_classifier(data, classes, seed=1) if arguments.gradients else None
    for scale in arguments.gradients:
        images = sample_towards(sampler, other, seeds, labels, scale)
        row(f"{len(seeds)} samples without labels, classifier guidance {scale:g}", images, labels)
    if arguments.swap is not None:
        figures["swapped"] = measure_swaps(classifier, sampler, test, *arguments.swap, arguments.per_class)
    if arguments.out is not None:
        atomic_write(arguments.out, (json.dumps(figures, indent=1) + "\n").encode())
    if too_few:
        sys.exit(f"fewer than {enough:.1%} were recognised at guidance {', '.join(too_few)}")


def sample_towards(sampler: Sampler, classifier: nn.Module, seeds: Sequence[int], labels: Tensor, scale: float) -> Tensor:
    """Samples without labels, guided by a classifier of images."""
    images = []
    for part, asked in zip(torch.tensor(seeds).split(64), labels.split(64), strict=True):

        def log_likelihood(x0: Tensor, asked: Tensor = asked) -> Tensor:
            return -scale * F.cross_entropy(classifier(x0), asked, reduction="none")

        images.append(sampler.sample(seeds=part.tolist(), gradient=likelihood_gradient(log_likelihood, sampler)))
    return torch.cat(images).cpu()


@torch.no_grad()
def measure_swaps(
    classifier: nn.Module, sampler: Sampler, test: ImageSet, source: int, target: int, count: int
) -> dict[str, list[float]]:
    """By strength: of images of one class, swapped to another, which share is taken for which, and how far they are from the
    originals (root mean square, in images of [-1, 1]). Printed as a table."""
    images = to_unit_range(test.images[test.labels == source][:count]).contiguous()
    print(f"\n| strength | taken for {source} | taken for {target} | distance |\n|---|---|---|---|")
    found = {}
    for strength in (0.0, *STRENGTHS):
        swapped = swap_class(sampler, images, source=source, target=target, strength=strength, guidance=2.0).cpu()
        taken = classifier(swapped.clamp(-1, 1)).argmax(1)
        shares = [(taken == label).double().mean().item() for label in (source, target)]
        distance = (swapped - images).square().mean().sqrt().item()
        print(f"| {strength:g} | {100 * shares[0]:.0f} | {100 * shares[1]:.0f} | {distance:.3f} |", flush=True)
        found[f"{strength:g}"] = [*shares, distance]
    return found


if __name__ == "__main__":
    main()
