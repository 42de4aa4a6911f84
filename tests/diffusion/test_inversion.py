import numpy as np
import pytest
import torch

from ddim_fast import Sampler, UNet, seeded_noise
from ddim_fast.diffusion.inversion import inverse_step
from ddim_fast.diffusion.step import StepCoefficients
from ddim_fast.io.progress import watch

SHAPE = (3, 8, 8)


def test_each_step_evaluates_the_level_it_starts_from(fake_network):
    network = fake_network()
    sampler = Sampler(network, steps=None, spacing=[900, 500, 100, 10])
    sampler.encode(torch.zeros(1, *SHAPE))
    assert network.calls == [10, 10, 100, 500]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_equals_equation_14(prediction_type, fake_network):
    network = fake_network(prediction_type=prediction_type).double()
    sampler = Sampler(network, steps=None, spacing=[900, 500, 100, 10])
    images = seeded_noise([1, 2], 7, SHAPE) * 0.5
    bars = sampler.schedule.alphas_cumprod
    # Without noise a sample prediction does not determine epsilon: the images count as x at the first timestep.
    start = bars[10] if prediction_type == "sample" else 1.0
    x = images.double()
    for t, a, b in zip([10, 10, 100, 500], [start, *bars[[10, 100, 500]]], bars[[10, 100, 500, 900]], strict=True):
        output = network(x, torch.tensor(t)).detach()
        if prediction_type == "epsilon":
            eps = output
        elif prediction_type == "v_prediction":
            eps = np.sqrt(a) * output + np.sqrt(1 - a) * x
        else:
            eps = (x - np.sqrt(a) * output) / np.sqrt(1 - a)
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - b) * eps
    torch.testing.assert_close(sampler.encode(images).double(), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "steps,least,most",
    [pytest.param(5, 20, 42, marks=pytest.mark.slow), (10, 8, 17), pytest.param(20, 6, 11, marks=pytest.mark.slow)],
)
def test_exact_inversion_costs_what_its_help_says(steps, least, most):
    sampler, told = Sampler("fashion-mnist", steps=steps), []
    images = sampler.sample(seeds=[1, 2], labels=[3, 7])
    with watch(lambda images, evaluations: told.append(evaluations)):
        sampler.encode(images, labels=[3, 7], exact=True)
    assert least <= sum(told) / steps <= most


def test_a_network_that_ignores_the_image_is_inverted_exactly(fake_network):
    network = fake_network()
    network.weight.data.zero_()
    network.forward = lambda x, t, labels=None: torch.full_like(x, 0.3)
    sampler = Sampler(network, steps=10)
    images = seeded_noise([1, 2], 7, SHAPE) * 0.5
    torch.testing.assert_close(sampler.sample(x_T=sampler.encode(images)), images, atol=1e-4, rtol=1e-4)


def test_labels_and_guidance_reach_the_network(fake_network):
    sampler = Sampler(fake_network(num_classes=4), steps=5)
    images = seeded_noise([1, 2], 7, SHAPE) * 0.5
    codes = [
        sampler.encode(images, **options) for options in ({}, {"labels": 1}, {"labels": [1, 3]}, {"labels": 1, "guidance": 3.0})
    ]
    assert torch.equal(codes[1][0], codes[2][0])
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(codes[i], codes[j], atol=1e-3)


@pytest.mark.parametrize("steps,prediction_type", [(3, "epsilon"), (10, "epsilon"), (10, "v_prediction"), (10, "sample")])
def test_exact_inversion_gives_the_images_back(steps, prediction_type, fake_network):
    sampler = Sampler(fake_network(prediction_type=prediction_type, num_classes=4), steps=steps, spacing="linear")
    images = seeded_noise([1, 2], 7, SHAPE) * 0.2  # within what the fake network, a tanh, can predict
    options = {"labels": [1, 3], "guidance": 1.5}
    latents = sampler.encode(images, **options, exact=True)
    torch.testing.assert_close(sampler.sample(x_T=latents, **options), images, atol=1e-3, rtol=0)
    plain = sampler.sample(x_T=sampler.encode(images, **options), **options)
    assert (plain - images).abs().max() > 0.01, "the inversion by Euler's steps would do as well"


@pytest.mark.slow
def test_exact_inversion_of_the_packaged_model():
    """To rounding in few steps, each image as if it were alone."""
    sampler = Sampler(UNet.from_pretrained("fashion-mnist"), steps=5)
    images = Sampler(sampler.model, steps=10).sample(seeds=[0, 1], labels=[3, 9]).clamp(-1, 1)
    latents = sampler.encode(images, labels=[3, 9], exact=True)
    errors = (sampler.sample(x_T=latents, labels=[3, 9]) - images).square().mean((1, 2, 3)) / 4
    assert errors.max() < 1e-6
    assert torch.equal(sampler.encode(images[1:], labels=[9], exact=True)[0], latents[1])


def test_exact_inversion_of_a_step_that_has_none_is_the_nearest():
    """x -> |x| never leads to -1."""
    nearest = inverse_step(torch.abs, StepCoefficients(1, 0, 1, 0, 0, 1, 0), torch.full((1, 1, 2, 2), -1.0))
    assert nearest.isfinite().all() and nearest.abs().max() <= 1


@pytest.mark.parametrize("options", [{"solver": "unipc"}, {"clip_sample_range": 1.0}])
def test_what_has_no_exact_inverse_is_refused(options, fake_network):
    sampler = Sampler(fake_network(), steps=3, **options)
    with pytest.raises(ValueError, match=r"encode\(exact=True\) inverts steps of the ddim solver, without clipping"):
        sampler.encode(torch.zeros(1, *SHAPE), exact=True)


def test_exact_inversion_from_zero_snr_of_a_network_that_predicts_the_image(fake_network):
    network = fake_network(prediction_type="sample", rescale_betas_zero_snr=True)
    sampler = Sampler(network, steps=4, spacing="trailing")
    latents = sampler.encode(sampler.sample(seeds=[0, 1]), exact=True)
    assert latents.isfinite().all()
