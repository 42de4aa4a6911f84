import numpy as np
import pytest
import torch

from ddim_fast import Sampler, UNet, seeded_noise
from ddim_fast.diffusion.degradations import CompressedSensing, Downscale, Mask
from ddim_fast.diffusion.restoration import TimeTravel, inconsistency, measure, restoration_steps
from ddim_fast.diffusion.step import step_coefficients

SHAPE = (3, 8, 8)
SEEDS = [4, 7]


def known_half():
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:, :4] = True
    return known


def psnr(a, b):
    return -10 * torch.log10(((a.clamp(-1, 1) - b) / 2).square().mean())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("travel", [None, TimeTravel(2, 3)])
def test_known_pixels_stay_exactly_as_they_are(travel, prediction_type, fake_network):
    images, mask = seeded_noise(SEEDS, 9, SHAPE).clamp(-1, 1), Mask(known_half())
    sampler = Sampler(fake_network(prediction_type=prediction_type), steps=5)
    restored = sampler.restore(mask(images), mask, seeds=SEEDS, travel=travel)
    assert torch.equal(restored[..., :4], images[..., :4])
    assert restored.isfinite().all() and not torch.allclose(restored[..., 4:], images[..., 4:], atol=0.1)


@pytest.mark.parametrize("operator", [Downscale(2), CompressedSensing((8, 8), 0.5)], ids=lambda o: type(o).__name__)
def test_the_operator_of_the_result_is_the_measurement(operator, fake_network):
    y = operator(seeded_noise(SEEDS, 9, SHAPE))
    restored = Sampler(fake_network(), steps=5).restore(y, operator, seeds=SEEDS)
    torch.testing.assert_close(operator(restored), y, atol=1e-5, rtol=1e-5)


def test_an_image_depends_on_its_seed_and_measurement_alone(fake_network):
    operator = Downscale(2)
    y = operator(seeded_noise(SEEDS, 9, SHAPE))
    sampler = Sampler(fake_network(num_classes=4), steps=5)
    both = sampler.restore(y, operator, seeds=SEEDS, labels=[1, 3], guidance=2.0)
    alone = sampler.restore(y[1:], operator, seeds=SEEDS[1:], labels=3, guidance=2.0)
    torch.testing.assert_close(both[1:], alone)
    assert not torch.allclose(sampler.restore(y[1:], operator, seeds=[5], labels=3, guidance=2.0), alone, atol=0.1)


def test_a_step_is_algorithm_1_in_plain_words(fake_network):
    """Of Wang, Yu and Zhang 2023: x_0 corrected, then a sample of p(x_{t-1} | x_t, x_0)."""
    network, operator = fake_network(), Mask(known_half())
    sampler = Sampler(network, steps=3)
    y = operator(seeded_noise(SEEDS, 9, SHAPE))
    x = next(sampler.trajectory(seeds=SEEDS)).before
    levels = [*sampler.schedule.alphas_cumprod[sampler.timesteps], 1.0]
    for i, t in enumerate(sampler.timesteps):
        a, b = levels[i], levels[i + 1]
        with torch.no_grad():
            x0 = (x - (1 - a) ** 0.5 * network(x, torch.tensor(t))) / a**0.5
        x0 = torch.where(known_half(), y, x0)
        c = step_coefficients(a, b, 1.0, "sample")
        eps = (x - a**0.5 * x0) / (1 - a) ** 0.5
        x = c.prev_from_x0 * x0 + c.prev_from_eps * eps + c.sigma * seeded_noise(SEEDS, i, SHAPE)
    restored = sampler.restore(y, operator, seeds=SEEDS, eta=1.0)
    torch.testing.assert_close(restored, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ["compiled", pytest.param("captured", marks=pytest.mark.gpu)])
def test_every_engine_restores_the_same(engine, fake_network):
    network = fake_network().to("cuda" if engine == "captured" else "cpu")
    eager, other = Sampler(network, steps=3), Sampler(network, steps=3, engine=engine)
    operator = Mask(known_half())
    y = operator(seeded_noise(SEEDS, 9, SHAPE))
    expected, restored = (sampler.restore(y, operator, seeds=SEEDS) for sampler in (eager, other))
    torch.testing.assert_close(restored, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(restored[..., :4].cpu(), y[..., :4])
    # Another measurement takes the same compiled step.
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    expected = eager.restore(-y, operator, seeds=[1, 2])
    torch.testing.assert_close(other.restore(-y, operator, seeds=[1, 2]), expected, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_time_travel_goes_back_and_comes_again(fake_network):
    assert list(TimeTravel().steps(3)) == [(0, 1), (1, 2), (2, 3)]
    assert list(TimeTravel(2, 2).steps(3)) == [(0, 1), (1, 0), (0, 1), (1, 2), (2, 2), (2, 3)]
    network = fake_network()
    sampler = Sampler(network, steps=3)
    operator = Downscale(2)
    sampler.restore(operator(torch.zeros(1, *SHAPE)), operator, seeds=[0], travel=TimeTravel(2, 2))
    first, second, third = sampler.timesteps.tolist()
    assert network.calls == [first, second, first, second, third, third]


@pytest.mark.parametrize("noise_std", [0.0, 0.2])
@pytest.mark.parametrize("travel", [None, TimeTravel(2, 2)])
def test_every_step_leaves_the_noise_of_its_level(travel, noise_std):
    """If x_0 is the image, x has the variance of its level after each step, the measurement's noise being a part of it."""
    levels = np.array([0.01, 0.2, 0.6, 0.95, 1.0])
    operator = Downscale(2)
    timesteps = np.array([900, 500, 200, 20])
    evaluated, table = restoration_steps(timesteps, levels, "epsilon", operator, noise_std=noise_std, travel=travel)
    ends = list((travel or TimeTravel()).steps(4))
    assert len(evaluated) == len(table) == len(ends)
    for (start, end), row in zip(ends, table.astype(np.float64), strict=True):
        from_x0, from_eps, sigma, share = row[4], row[5], row[6], row[9]
        assert from_x0 == pytest.approx(levels[end] ** 0.5, rel=1e-5)
        noise = from_eps**2 + sigma**2 + (share * from_x0 * noise_std * operator.gain) ** 2
        assert noise == pytest.approx(1 - levels[end], abs=1e-5)
        assert share == 1 or noise_std > 0
        assert evaluated[ends.index((start, end))] == timesteps[start]


@pytest.mark.parametrize(
    "operator,gain",
    [pytest.param(Downscale(2), 1.0, id="x2"), pytest.param(CompressedSensing((32, 32), 0.3), 3.0, marks=pytest.mark.slow)],
)
def test_the_packaged_model_restores_better_than_the_pseudo_inverse(operator, gain):
    model = UNet.from_pretrained("fashion-mnist")
    labels = [0, 2, 5, 9]
    images = Sampler(model, steps=20).sample(seeds=range(4), labels=labels, guidance=2.0).clamp(-1, 1)
    y = operator(images)
    restored = Sampler(model, steps=20).restore(y, operator, seeds=range(10, 14), labels=labels)
    assert psnr(restored, images) >= psnr(operator.pseudo_inverse(y), images) + gain


def test_noise_in_the_measurement_is_not_taken_for_detail():
    model, operator = UNet.from_pretrained("fashion-mnist"), Downscale(2)
    labels = [0, 2, 5, 9]
    images = Sampler(model, steps=20).sample(seeds=range(4), labels=labels, guidance=2.0).clamp(-1, 1)
    y = operator(images) + 0.3 * seeded_noise(range(4), 1, (1, 16, 16))
    sampler = Sampler(model, steps=20)
    aware, naive = (sampler.restore(y, operator, seeds=range(4), labels=labels, noise_std=std) for std in (0.3, 0.0))
    assert psnr(aware, images) > psnr(naive, images) + 1


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda s: s.restore(torch.zeros(2, 3, 4, 4), Downscale(2), seeds=[1]), "1 seed for 2 measurements"),
        (lambda s: s.restore(torch.zeros(1, 3, 8, 8), Downscale(2), seeds=[1]), r"of shape \(3, 16, 16\), but the network's"),
        (
            lambda s: s.restore(torch.zeros(1, 3, 4, 4), Downscale(2), seeds=[1], noise_std=-1.0),
            "noise_std must be a number of 0",
        ),
        (lambda s: s.restore(torch.zeros(1, 3, 4, 4), Downscale(2), seeds=[1], eta=2.0), r"eta must lie in \[0, 1\]"),
        (lambda s: TimeTravel(0, 1), "time travel needs a length of 1 or more; got 0"),
        (lambda s: TimeTravel(1, 1.5), "time travel needs a repeats of 1 or more; got 1.5"),
    ],
)
def test_what_does_not_fit_is_named(call, message, fake_network):
    with pytest.raises(ValueError, match=message):
        call(Sampler(fake_network(), steps=3))


def test_a_measurement_has_the_noise_of_its_seed():
    images, operator = seeded_noise(range(200), 9, SHAPE), Downscale(2)
    y = measure(operator, images, 0.3, range(200))
    assert (y - operator(images)).std().item() == pytest.approx(0.3, rel=0.03)
    torch.testing.assert_close(y[5:6], measure(operator, images[5:6], 0.3, [5]))
    assert torch.equal(measure(operator, images, 0.0, range(200)), operator(images))


def test_inconsistency_is_the_largest_of_each_image():
    images, mask = torch.zeros(2, *SHAPE), Mask(known_half())
    y = mask(images)
    images[0, 1, 2, 3], images[0, 0, 0, 0], images[1, :, :, 5] = -0.5, 0.25, 9.0
    assert inconsistency(mask, images, y).tolist() == [0.5, 0.0]
