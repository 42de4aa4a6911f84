"""Classifier guidance, where the answer is known; and classifier-free guidance in an interval."""

import numpy as np
import pytest
import torch
from torch import nn

from ddim_fast import NoiseSchedule, Sampler, UNetConfig, seeded_noise
from ddim_fast.diffusion.degradations import Grey
from ddim_fast.diffusion.guidance import likelihood_gradient
from ddim_fast.ops.noise import INITIAL_NOISE

SHAPE = (3, 8, 8)
MEAN, STD = 0.3, 0.5  # of every pixel of the data
SEEN, SEEN_STD = -0.4, 0.4  # what was seen of a pixel, and the error of seeing


class GaussianNetwork(nn.Module):
    """The exact answer for pixels that are independent and normal, of mean MEAN and standard deviation ``std``."""

    def __init__(self, prediction_type="epsilon", std=STD, mean=MEAN, **fields):
        super().__init__()
        self.config = UNetConfig(sample_size=8, channel_multipliers=(1,), prediction_type=prediction_type, **fields)
        self.register_parameter("weight", nn.Parameter(torch.zeros(())))
        self.bar = torch.tensor(NoiseSchedule.from_config(self.config).alphas_cumprod)
        self.std, self.mean = std, mean

    def posterior(self, x, timestep):
        """Mean and variance of x_0 given x_t, and by how much the mean changes with x_t."""
        a = self.bar[timestep].double().reshape(-1, 1, 1, 1)
        total = a * self.std**2 + 1 - a
        slope = a.sqrt() * self.std**2 / total
        return self.mean + slope * (x.double() - a.sqrt() * self.mean), self.std**2 * (1 - a) / total, slope

    def forward(self, x, timesteps, labels=None):
        a = self.bar[timesteps].reshape(-1, 1, 1, 1)
        x0, x = self.posterior(x, timesteps)[0], x.double()
        if self.config.prediction_type == "sample":
            return x0.float()
        if self.config.prediction_type == "epsilon":
            return ((x - a.sqrt() * x0) / (1 - a).sqrt()).float()
        return ((a.sqrt() * x - x0) / (1 - a).sqrt()).float()


def exact_gradient(network):
    """Of log p(SEEN | x_t): what was seen is normal too, of the mean and variance of x_0 given x_t and the error of seeing."""

    def gradient(x, timestep, x0):
        mean, variance, slope = network.posterior(x, timestep)
        torch.testing.assert_close(x0, mean.float(), atol=1e-3, rtol=1e-3)
        return slope * (SEEN - mean) / (variance + SEEN_STD**2)

    return gradient


@pytest.mark.parametrize(
    "solver,eta,zero_snr,prediction_type",
    [
        ("ddim", 0.0, False, "epsilon"),
        ("ddim", 0.0, False, "v_prediction"),
        ("ddim", 0.0, False, "sample"),
        ("ddim", 1.0, False, "epsilon"),
        ("ddim", 0.0, True, "v_prediction"),
        ("ddim", 0.0, True, "sample"),
        ("ddpm", 0.0, False, "epsilon"),
        ("unipc", 0.0, False, "v_prediction"),
        ("dpm-solver++", 0.0, False, "epsilon"),
    ],
)
def test_samples_are_the_posterior_of_a_gaussian(solver, eta, zero_snr, prediction_type):
    network = GaussianNetwork(prediction_type, rescale_betas_zero_snr=zero_snr)
    sampler = Sampler(network, steps=400, eta=eta, solver=solver)
    images = sampler.sample(seeds=range(100), gradient=exact_gradient(network), batch_size=100)
    precision = 1 / STD**2 + 1 / SEEN_STD**2
    # 19,200 pixels: a standard error of 0.0023 of the mean, of 0.0016 of the standard deviation.
    assert images.mean().item() == pytest.approx((MEAN / STD**2 + SEEN / SEEN_STD**2) / precision, abs=0.008)
    assert images.std().item() == pytest.approx(precision**-0.5, abs=0.008)


def test_a_likelihood_of_x0_moves_pixels_of_unit_variance_to_where_they_belong():
    """The gradient is exact there but for the variance of x_0, which the likelihood does not know of: so it is made as wide."""
    network = GaussianNetwork(std=1.0, mean=0.0)
    sampler = Sampler(network, steps=50)
    width = 2.0
    gradient = likelihood_gradient(lambda x0: -((x0 - 1) ** 2).sum((1, 2, 3)) / (2 * width**2), sampler)
    x, bar = seeded_noise([0], 5, SHAPE), sampler.schedule.alphas_cumprod
    for t in (999, 300, 0):
        x0 = np.sqrt(bar[t]) * x
        expected = np.sqrt(bar[t]) * (1 - x0) / width**2
        torch.testing.assert_close(gradient(x, torch.tensor(t), x0.clone()), expected)
    images = sampler.sample(seeds=range(20), gradient=gradient)
    posterior_mean = (1 / width**2) / (1 + 1 / width**2)
    assert images.mean().item() == pytest.approx(posterior_mean, abs=0.05)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_it_goes_with_classifier_free_guidance(prediction_type, fake_network):
    """One step: epsilon of both kinds of guidance, by hand."""
    network = fake_network(num_classes=4, prediction_type=prediction_type)
    x, push = seeded_noise([0, 1], INITIAL_NOISE, SHAPE), seeded_noise([0, 1], 3, SHAPE)
    sampler = Sampler(network, steps=None, spacing=[500])
    t, a = torch.tensor(500), sampler.schedule.alphas_cumprod[500]
    with torch.no_grad():
        none, label = network(x, t, torch.tensor([4, 4])), network(x, t, torch.tensor([1, 3]))
    output, (signal, noise) = none + 2.5 * (label - none), np.sqrt([a, 1 - a])
    eps = {
        "epsilon": lambda: output,
        "v_prediction": lambda: noise * x + signal * output,
        "sample": lambda: (x - signal * output) / noise,
    }[prediction_type]()
    guided = (x - noise * (eps - noise * push)) / signal
    (state,) = sampler.trajectory(x_T=x, labels=[1, 3], guidance=2.5, gradient=lambda x, t, x0: push)
    torch.testing.assert_close(state.x, guided.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state.x0, state.x, atol=1e-4, rtol=1e-4)  # the last step leads there


def test_the_gradient_may_be_of_a_network(small_unet):
    """A classifier is three lines, and an image does not depend on its batch."""
    torch.manual_seed(1)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    asked = torch.tensor([1, 7, 3, 5, 2])

    def towards(labels):
        def gradient(x, timestep, x0):
            x = x.requires_grad_()
            log_p = classifier(x).log_softmax(1)[range(len(x)), labels]
            return 5.0 * torch.autograd.grad(log_p.sum(), x)[0]

        return gradient

    sampler = Sampler(small_unet, steps=4, eta=1.0)
    plain, guided = (sampler.sample(seeds=range(5), labels=0, gradient=g) for g in (None, towards(asked)))
    log_p = [classifier(images).log_softmax(1)[range(5), asked] for images in (plain, guided)]
    assert (log_p[1] > log_p[0] + 0.5).all()
    for i in range(5):
        alone = sampler.sample(seeds=[i], labels=0, gradient=towards(asked[i : i + 1]))
        torch.testing.assert_close(alone, guided[i : i + 1], atol=1e-5, rtol=1e-5)


def test_it_sees_the_clipped_prediction_and_no_gradient_is_kept(fake_network):
    seen = []

    def gradient(x, timestep, x0):
        seen.append((int(timestep), x0.abs().max().item()))
        assert torch.is_grad_enabled() and not x.requires_grad
        return torch.zeros_like(x).requires_grad_()

    sampler = Sampler(fake_network(), steps=3, clip_sample_range=0.5)
    images = sampler.sample(seeds=[0, 1, 2], batch_size=2, gradient=gradient)
    assert torch.equal(images, sampler.sample(seeds=[0, 1, 2])) and not images.requires_grad
    assert [t for t, _ in seen] == 2 * sampler.timesteps.tolist() and max(largest for _, largest in seen) == 0.5


@pytest.mark.parametrize("gradient", [lambda x, t, x0: x.sum(), lambda x, t, x0: 1.0], ids=["shape", "number"])
def test_what_is_no_gradient_is_named(gradient, fake_network):
    with pytest.raises(ValueError, match=r"gradient must return a tensor like x_t, of shape \(1, 3, 8, 8\); got"):
        Sampler(fake_network(), steps=2).sample(seeds=[0], gradient=gradient)


def test_controlled_steps_have_no_between(fake_network):
    with pytest.raises(ValueError, match="so there are none to call a gradient between; use fixed steps"):
        Sampler(fake_network(), tolerance=0.1).sample(seeds=[0], gradient=lambda x, t, x0: x)


def test_outside_of_the_interval_a_step_is_one_without_guidance(small_unet):
    timesteps = [900, 700, 500, 300, 100]
    request, sampler = {"seeds": [3, 8, 1], "labels": [0, 9, 4]}, Sampler(small_unet, steps=None, spacing=timesteps)
    x = seeded_noise(request["seeds"], INITIAL_NOISE, (3, 16, 16))
    for i, guidance in enumerate((None, 3.0, 3.0, None, None)):
        rest = Sampler(small_unet, steps=None, spacing=timesteps[i:])
        x = next(rest.trajectory(x_T=x, labels=request["labels"], guidance=guidance)).x
    images = sampler.sample(**request, guidance=3.0, guidance_interval=(500, 700))
    assert torch.equal(images, x) and sampler.evaluations.tolist() == [7, 7, 7]
    plain = sampler.sample(**request)
    assert torch.equal(sampler.sample(**request, guidance=3.0, guidance_interval=(101, 299)), plain)
    everywhere = sampler.sample(**request, guidance=3.0, guidance_interval=(0, 999))
    assert torch.equal(everywhere, sampler.sample(**request, guidance=3.0)) and not torch.allclose(everywhere, images)
    # Twelve images have their classes' conditions in rows, three have one each.
    many = sampler.sample(seeds=range(12), labels=[4] * 12, guidance=3.0, guidance_interval=(500, 700))
    few = sampler.sample(seeds=[1], labels=4, guidance=3.0, guidance_interval=(500, 700))
    assert torch.equal(many[1:2], few)


@pytest.mark.parametrize("engine", ["eager", "captured"])
def test_each_step_may_have_a_scale_of_its_own(engine, small_unet):
    sampler = Sampler(small_unet, steps=4, engine=engine, solver="unipc")
    request = {"seeds": [0, 1, 2], "labels": [1, 2, 0]}
    assert torch.equal(sampler.sample(**request, guidance=[3.0] * 4), sampler.sample(**request, guidance=3))
    low, high = sorted(sampler.timesteps[[1, 2]].tolist())
    limited = sampler.sample(**request, guidance=3, guidance_interval=(low, high))
    for scales in ([1, 3, 3, 1], np.array([1, 3, 3, 1.0]), torch.tensor([1.0, 3, 3, 1])):
        assert torch.equal(sampler.sample(**request, guidance=scales), limited)
        assert sampler.evaluations.tolist() == [6, 6, 6]
    assert torch.equal(sampler.sample(**request, guidance=[1] * 4), sampler.sample(**request))


def test_the_scales_are_those_of_their_steps(fake_network):
    network, scales = fake_network(num_classes=4), [2.0, 1.0, 0.5]
    sampler = Sampler(network, steps=3)
    states = list(sampler.trajectory(seeds=[0], labels=[3], guidance=scales))
    for state, scale in zip(states, scales, strict=True):
        with torch.no_grad():
            none, label = (network(state.before, torch.tensor([state.timestep]), torch.tensor([y])) for y in (4, 3))
        torch.testing.assert_close(state.output, none + scale * (label - none), atol=1e-5, rtol=1e-5)


def test_scales_are_as_many_as_shared_steps(small_unet):
    request, images = {"labels": [1], "guidance": [1.0, 2.0, 2.0]}, torch.zeros(1, *small_unet.config.image_shape)
    with pytest.raises(ValueError, match="guidance has 3 scales; give one, or one for each of the 4 steps"):
        Sampler(small_unet, steps=4).sample(seeds=[0], **request)
    sampler = Sampler(small_unet, steps=3)
    for call in (
        lambda: sampler.encode(images, **request),
        lambda: sampler.restore(images[:, :1], Grey(3), seeds=[0], **request),
        lambda: Sampler(small_unet, steps=3, tolerance=0.1).sample(seeds=[0], **request),
    ):
        with pytest.raises(ValueError, match="guidance has 3 scales; it takes a single scale here"):
            call()
    with pytest.raises(ValueError, match="in a list of scales, 1 leaves a step out"):
        sampler.sample(seeds=[0], **request, guidance_interval=(0, 500))
    with pytest.raises(ValueError, match="a scale of 1 for some steps, change the network's batch"):
        Sampler(small_unet, steps=3, reuse=2).sample(seeds=[0], **request)
    for wrong in (["a", 1.0, 2.0], [1.0, float("nan"), 2.0], "123"):
        with pytest.raises(ValueError, match="guidance must be a finite number, or one for each step"):
            sampler.sample(seeds=[0], labels=[1], guidance=wrong)


@pytest.mark.parametrize("exact", [False, True])
def test_an_interval_is_encoded_as_it_is_decoded(exact, fake_network):
    sampler = Sampler(fake_network(num_classes=4, beta_end=0.005), steps=40)
    request = {"labels": [1, 2], "guidance": 2.0, "guidance_interval": (100, 600)}
    images = sampler.sample(seeds=[0, 1], **request)
    again = sampler.sample(x_T=sampler.encode(images, **request, exact=exact), **request)
    wrong = sampler.sample(x_T=sampler.encode(images, labels=[1, 2], guidance=2.0, exact=exact), **request)
    assert (again - images).square().mean() < 0.1 * (wrong - images).square().mean()


def test_controlled_steps_are_guided_where_they_are_in_the_interval(small_unet):
    sampler = Sampler(small_unet, tolerance=0.05)
    request = {"seeds": [0, 1], "labels": [1, 2]}
    plain, guided = sampler.sample(**request), sampler.sample(**request, guidance=3.0)
    torch.testing.assert_close(sampler.sample(**request, guidance=3.0, guidance_interval=(0, 999)), guided)
    within = sampler.sample(**request, guidance=3.0, guidance_interval=(300, 600))
    assert not torch.allclose(within, plain, atol=1e-2) and not torch.allclose(within, guided, atol=1e-2)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"guidance_interval": (600, 300)}, r"two timesteps, the lower one first, from 0 to 999; got \(600, 300\)"),
        ({"guidance_interval": (0, 1000)}, "from 0 to 999"),
        ({"guidance_interval": (0.2, 0.8)}, "two timesteps"),
        ({"guidance_interval": 300}, "two timesteps"),
        ({"guidance_interval": (300, 600), "guidance": None}, "give its scale"),
    ],
    ids=str,
)
def test_what_is_no_interval_is_named(arguments, message, fake_network):
    sampler = Sampler(fake_network(num_classes=4), steps=2)
    with pytest.raises(ValueError, match=message):
        sampler.check(**{"seeds": [0], "labels": 1, "guidance": 2.0, **arguments})


def test_features_are_not_shared_between_guided_steps_and_others(small_unet):
    with pytest.raises(ValueError, match="use reuse=1, not 2"):
        Sampler(small_unet, steps=4, reuse=2).sample(seeds=[0], labels=1, guidance=2.0, guidance_interval=(300, 600))


@pytest.mark.parametrize("options", [{"steps": 60, "solver": "unipc"}, {"tolerance": 0.003}], ids=str)
def test_a_guide_leads_away_from_its_mean(options):
    """Of two normal distributions of one variance, guidance makes a third one at every noise level, whose mean is beyond."""
    network, guide = GaussianNetwork("v_prediction"), GaussianNetwork("v_prediction", mean=MEAN - 0.2)
    images = Sampler(network, guide=guide, **options).sample(seeds=range(100), guidance=3.0, batch_size=100)
    assert images.mean().item() == pytest.approx(MEAN - 0.2 + 3 * 0.2, abs=0.01)
    assert images.std().item() == pytest.approx(STD, abs=0.01)


def test_a_guide_is_asked_in_the_interval_alone_and_in_the_same_class(fake_network):
    network, guide = fake_network(num_classes=4), fake_network(num_classes=4)
    sampler = Sampler(network, steps=None, spacing=[900, 600, 300, 0], guide=guide)
    request = {"seeds": [1, 2], "labels": [0, 3]}
    plain = sampler.sample(**request)
    assert not guide.calls
    # A guide that knows as much as the network leads nowhere, whatever the scale.
    network.calls.clear()
    assert torch.equal(sampler.sample(**request, guidance=2.5, guidance_interval=(300, 600)), plain)
    assert network.calls == [900, 600, 300, 0] and guide.calls == [600, 300]
    assert sampler.evaluations.tolist() == [4, 4]


def test_a_guide_needs_no_labels_and_may_know_none(fake_network):
    network, guide = fake_network(num_classes=4), fake_network()
    sampler = Sampler(network, steps=3, guide=guide)
    assert not torch.equal(sampler.sample(seeds=[0], labels=2, guidance=2.0), sampler.sample(seeds=[0], labels=2))
    Sampler(fake_network(), steps=3, guide=guide).sample(seeds=[0], guidance=2.0)


def test_a_guide_goes_with_reused_features_in_an_interval(small_unet):
    sampler = Sampler(small_unet, steps=6, guide=small_unet, reuse=2)
    request = {"seeds": [0, 1], "labels": 3}
    guided = sampler.sample(**request, guidance=1.5, guidance_interval=(0, 500))
    assert guided.isfinite().all() and not torch.equal(guided, sampler.sample(**request))


@pytest.mark.parametrize(
    "fields,what",
    [
        ({"sample_size": 16}, "image_shape is .*16, 16.*, not .*8, 8"),
        ({"prediction_type": "v_prediction"}, "prediction_type is v_prediction, not epsilon"),
        ({"num_classes": 5}, "num_classes is 5, not 4"),
        ({"beta_end": 0.01}, "noise schedule"),
    ],
)
def test_a_guide_of_another_kind_is_refused(fields, what, fake_network):
    with pytest.raises(ValueError, match=f"the guide must be of the same kind as the network: its {what}"):
        Sampler(fake_network(num_classes=4), guide=fake_network(**{"num_classes": 4, **fields}))
