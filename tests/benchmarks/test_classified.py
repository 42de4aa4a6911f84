import torch
from classified import recognised, train_classifier

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
