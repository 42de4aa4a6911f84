"""The denoising error and the reconstruction error, on networks whose answers are known."""

import numpy as np
import pytest
import torch
from torch import nn

from ddim_fast import NoiseSchedule, Sampler, UNetConfig
from ddim_fast.evaluation.denoising import by_noise, denoising_error, spread_timesteps
from ddim_fast.evaluation.reconstruction import reconstruction_error
from ddim_fast.ops.noise import seeded_noise


class Oracle(nn.Module):
    """Knows that every image is ``value``, and answers as ``prediction_type`` wants it, ``off`` by so much in epsilon."""

    def __init__(self, prediction_type: str, value: float, off: float = 0.0) -> None:
        super().__init__()
        self.config = UNetConfig(sample_size=8, channel_multipliers=(1,), prediction_type=prediction_type)
        self.levels = torch.tensor(NoiseSchedule.from_config(self.config).alphas_cumprod, dtype=torch.float32)
        self.value, self.off = value, off
        self.weight = nn.Parameter(torch.zeros(()))

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, x, timesteps, labels=None):
        bar = self.levels[timesteps.reshape(-1)][:, None, None, None]
        a, s = bar.sqrt(), (1 - bar).sqrt()
        eps = (x - a * self.value) / s + self.off
        x0 = (x - s * eps) / a
        return {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[self.config.prediction_type]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("off", [0.0, 0.3])
def test_the_denoising_error_is_that_of_epsilon_whatever_is_predicted(prediction_type, off):
    images, timesteps = torch.full((40, 3, 8, 8), 0.4), spread_timesteps(40, 1000)
    network = Oracle(prediction_type, 0.4, off)
    errors = denoising_error(network, images, None, timesteps, range(40), batch_size=16)
    np.testing.assert_allclose(errors, np.full(40, off**2), atol=2e-5)


def test_the_noise_is_of_the_seed_whatever_the_batch(small_unet):
    images = seeded_noise(range(6), 0, (1, 16, 16)).clamp(-1, 1)
    labels, timesteps = torch.arange(6), spread_timesteps(6, 1000)
    together = denoising_error(small_unet, images, labels, timesteps, range(6))
    part = denoising_error(small_unet, images[4:], labels[4:], timesteps[4:], range(4, 6), batch_size=1)
    torch.testing.assert_close(part, together[4:], rtol=1e-5, atol=0)
    assert together.max() > 0.1


def test_timesteps_are_spread_evenly_and_not_in_order():
    timesteps = spread_timesteps(500, 1000)
    assert timesteps.sort().values.tolist() == list(range(0, 1000, 2)) and timesteps.tolist() != sorted(timesteps.tolist())
    assert spread_timesteps(3, 10).sort().values.tolist() == [0, 3, 6]


def test_errors_by_noise():
    timesteps = np.array([9, 0, 10, 299, 100, 999, 300])
    means = by_noise(timesteps.astype(np.float32), timesteps, 1000)
    assert means == {"0-9": 4.5, "10-29": 10, "30-99": None, "100-299": 199.5, "300-999": 649.5}
    assert by_noise(np.ones(2), np.array([0, 9]), 10) == {"0-0": 1, "1-2": None, "3-9": 1}


def test_reconstruction_falls_with_the_number_of_steps(fake_network):
    network = fake_network(beta_end=0.005)
    images = seeded_noise(range(5), 0, (3, 8, 8)).clamp(-1, 1)
    errors = [reconstruction_error(Sampler(network, steps=steps), images, batch_size=2).mean().item() for steps in (5, 20, 100)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_reconstruction_is_measured_in_the_range_of_the_paper():
    # An oracle decodes everything to 0.5: images of -0.5 are wrong by half of the range, in [0, 1].
    errors = reconstruction_error(Sampler(Oracle("sample", 0.5), steps=10), torch.full((2, 3, 8, 8), -0.5))
    np.testing.assert_allclose(errors, [0.25, 0.25], atol=1e-6)
