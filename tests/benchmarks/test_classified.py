import classified
import pytest
import torch
from classified import measure_swaps, recognised, train_classifier

from ddim_fast.data.images import ImageSet, to_unit_range


def halves(count, seed):
    """Noise that is brighter above (class 0) or below (class 1)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    images = torch.randint(0, 156, (count, 1, 16, 16), dtype=torch.uint8, generator=generator)
    images[labels == 0, :, :8] += 100
    images[labels == 1, :, 8:] += 100
    return ImageSet(images, labels)


def test_it_learns_what_can_be_told_apart_and_counts_by_class():
    classifier = train_classifier(halves(400, 0), classes=2, epochs=2, batch_size=40)
    test = halves(200, 1)
    images = to_unit_range(test.images)
    assert recognised(classifier, images, test.labels, 2).min() > 0.97
    # All taken for class 1: nobody of class 0 is recognised, and everybody of class 1.
    always = recognised(lambda part: torch.tensor([0.0, 1.0]).expand(len(part), 2), images, test.labels, 2)
    assert always.tolist() == [0.0, 1.0]
    assert torch.equal(train_classifier(halves(400, 0), 2, epochs=2, batch_size=40)(images), classifier(images))


def test_swapped_images_are_counted_by_strength(monkeypatch):
    monkeypatch.setattr(classified, "swap_class", lambda _, images, *, strength, **__: images * (1 if strength < 0.5 else -1))
    test = ImageSet(torch.full((3, 1, 4, 4), 255, dtype=torch.uint8), torch.tensor([7, 9, 7]))

    def bright_is_7(images):
        return torch.nn.functional.one_hot(torch.where(images.mean((1, 2, 3)) > 0, 7, 9), 10).float()

    found = measure_swaps(bright_is_7, None, test, 7, 9, count=5)
    assert found["0"] == found["0.4"] == [1, 0, 0]
    assert found["0.6"] == found["1"] == pytest.approx([0, 1, 2])
