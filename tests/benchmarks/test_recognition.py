import torch
from recognition import Recogniser, train_recogniser


def spectrograms(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of three classes: a low, a middle and a high band, each at any time, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    images = 0.1 * torch.randn(count, 1, 32, 32, generator=generator) - 0.9
    for image, label in zip(images, labels.tolist(), strict=True):
        start = int(torch.randint(20, (), generator=generator))
        image[0, 10 * label + 4 : 10 * label + 8, start : start + 8] += 0.8
    return images, labels


def test_it_learns_to_tell_bands_apart():
    recogniser = train_recogniser(*spectrograms(120, 0), steps=60, batch_size=30)
    images, labels = spectrograms(60, 1)
    assert not recogniser.training
    with torch.no_grad():
        assert (recogniser(images).argmax(1) == labels).float().mean() > 0.9


def test_the_same_seed_gives_the_same_classifier():
    a, b = (train_recogniser(*spectrograms(20, 0), steps=2, seed=5) for _ in range(2))
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name])


def test_sounds_may_have_any_length():
    model = Recogniser(4, mels=16).eval()
    assert model(torch.zeros(2, 1, 16, 48)).shape == (2, 4)
