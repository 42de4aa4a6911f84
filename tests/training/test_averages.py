import numpy as np
import pytest
import torch
from torch import nn

from ddim_fast.training.averages import LENGTHS, MAX_LENGTH, PowerAverages, average_of_length, exponent_of_length

STEPS, EVERY = 600, 40


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A folder of snapshots of a network whose weights wander, and what they were after each step."""
    folder = tmp_path_factory.mktemp("run") / "ema"
    model, history = nn.Linear(3, 2), []
    generator = torch.Generator().manual_seed(0)
    averages = PowerAverages(model)
    for step in range(STEPS):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        averages.update(step)
        history.append(model.weight.detach().clone())
        if (step + 1) % EVERY == 0:
            averages.write_snapshot(folder, step + 1)
    return folder, torch.stack(history).double().numpy()


def of_profile(history: np.ndarray, length: float) -> np.ndarray:
    """The average by its definition: the weights of step tau by the integral of tau^gamma over the step."""
    power = exponent_of_length(length) + 1
    share = np.diff((np.arange(len(history) + 1) / len(history)) ** power)
    return np.einsum("t,tij->ij", share, history)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, MAX_LENGTH])
def test_the_length_is_the_profiles_standard_deviation(length):
    tau = (np.arange(100_000) + 0.5) / 100_000
    profile = tau ** exponent_of_length(length)
    profile /= profile.sum()
    mean = (profile * tau).sum()
    assert np.sqrt((profile * (tau - mean) ** 2).sum()) == pytest.approx(length, rel=1e-5)


def test_an_average_that_was_kept_follows_its_formula(walk):
    folder, history = walk
    for length in LENGTHS:
        average = average_of_length(folder, length)
        assert average.steps == STEPS and average.error < 1e-6
        np.testing.assert_allclose(average.weights["weight"], of_profile(history, length), atol=4e-3)


@pytest.mark.parametrize("length", [0.04, 0.07, 0.13, 0.15])
def test_an_average_of_another_length_is_made_afterwards(walk, length):
    folder, history = walk
    average = average_of_length(folder, length)
    expected = of_profile(history, length)
    assert average.weights["weight"].dtype == torch.float32 and set(average.weights) == {"weight", "bias"}
    assert average.error < 0.02
    np.testing.assert_allclose(average.weights["weight"], expected, atol=0.01)
    # Neither of the two that were kept, nor the last weights, would have passed.
    for other in (*(of_profile(history, kept) for kept in LENGTHS), history[-1]):
        assert np.abs(other - expected).max() > 0.03


def test_its_error_says_where_there_are_too_few_snapshots(walk):
    folder, history = walk
    error, off = zip(
        *(
            (average.error, np.abs(average.weights["weight"].numpy() - of_profile(history, length)).max())
            for length in (0.07, 0.03, 0.01)
            for average in [average_of_length(folder, length)]
        ),
        strict=True,
    )
    assert error[0] < 0.01 < error[1] < 0.1 < error[2]
    assert off[0] < off[1] < off[2]


def test_saved_averages_go_on(walk):
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    averages, resumed = PowerAverages(one), PowerAverages(other)
    averages.update(0)
    resumed.load_state_dict(averages.state_dict())
    with torch.no_grad():
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            q.copy_(p.add_(1))
    for each in (averages, resumed):
        each.update(1)
    for name, tensor in averages.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


@pytest.mark.parametrize("length", [0, -0.1, 0.3, float("nan")])
def test_impossible_lengths_are_errors(walk, length):
    with pytest.raises(ValueError, match=r"length of an average must be above 0 and at most 0\.288"):
        average_of_length(walk[0], length)


def test_snapshots_that_are_missing_or_damaged_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no snapshots of averages in .*--ema-snapshots"):
        average_of_length(tmp_path / "ema", 0.1)
    averages, wider = PowerAverages(nn.Linear(3, 2)), PowerAverages(nn.Linear(4, 2))
    averages.write_snapshot(tmp_path / "ema", 10)
    wider.write_snapshot(tmp_path / "ema", 20)
    with pytest.raises(ValueError, match=r"00000020\.safetensors: not a snapshot of this network"):
        average_of_length(tmp_path / "ema", 0.1)
    overflowing = nn.Linear(3, 2)
    nn.init.constant_(overflowing.bias, 1e6)  # above what float16 has
    PowerAverages(overflowing).write_snapshot(tmp_path / "ema", 20)
    with pytest.raises(ValueError, match=r"00000020\.safetensors: tensor '0\.05/bias' is not finite"):
        average_of_length(tmp_path / "ema", 0.1)
    (tmp_path / "ema" / "00000020.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"00000020\.safetensors: not a whole safetensors file"):
        average_of_length(tmp_path / "ema", 0.1)
