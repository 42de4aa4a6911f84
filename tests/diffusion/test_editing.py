import pytest
import torch

from ddim_fast import NoiseSchedule, Sampler, UNet, seeded_noise, select_timesteps
from ddim_fast.diffusion.editing import attribute_direction, move_along, sdedit, start_timestep, swap_class
from ddim_fast.ops.noise import INITIAL_NOISE

SHAPE = (3, 8, 8)


@pytest.fixture
def sampler(fake_network):
    return Sampler(fake_network(num_classes=4, beta_end=0.005), steps=10)


@pytest.fixture
def images():
    return 0.5 * seeded_noise([11, 12, 13], 0, SHAPE).clamp(-1, 1)


def reconstruction(sampler, images, **request):
    return sampler.sample(x_T=sampler.encode(images, **request), **request)


def test_strength_says_where_it_starts():
    assert [start_timestep(s, 1000) for s in (0, 0.0004, 0.001, 0.6, 1)] == [None, None, 0, 599, 999]
    for bad in (-0.1, 1.1, float("nan"), "much", True):
        with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\]; got"):
            start_timestep(bad, 1000)


@pytest.mark.parametrize("spacing", ["linear", "quadratic", "trailing", "linspace", "log-snr"])
def test_a_later_start_has_as_many_steps_and_shares_the_network(spacing, fake_network):
    sampler = Sampler(fake_network(), steps=6, spacing=spacing)
    later = sampler.starting_at(400)
    assert len(later.timesteps) == 6 and later.timesteps[0] == 400 and later.timesteps.min() >= 0
    assert later.starting_at(400) is later is sampler.starting_at(400) and later.denoiser is sampler.denoiser
    assert sampler.starting_at(3).timesteps.tolist() == [3, 2, 1, 0]
    alone = Sampler(fake_network(), steps=None, spacing=later.timesteps.tolist())
    x = seeded_noise([0], 1, SHAPE)
    assert torch.equal(later.sample(x_T=x), alone.sample(x_T=x))
    assert torch.equal(later.encode(x), alone.encode(x)) and not torch.equal(later.encode(x), sampler.encode(x))


def test_a_later_start_of_a_list_leaves_out_what_is_before(fake_network):
    sampler = Sampler(fake_network(), steps=None, spacing=[900, 500, 400, 20])
    assert sampler.starting_at(450).timesteps.tolist() == [400, 20]
    with pytest.raises(ValueError, match=r"no listed timestep lies in 0..10, where the run starts; got 20..900"):
        sampler.starting_at(10)
    with pytest.raises(ValueError, match=r"start must be a timestep from 0 to 999; got 1000"):
        select_timesteps(NoiseSchedule.linear(), 5, start=1000)
    with pytest.raises(ValueError, match="there are none to start at"):
        Sampler(fake_network(), tolerance=0.1).starting_at(10)


def test_sdedit_of_no_strength_is_the_image_and_of_full_strength_a_sample(sampler, images):
    request = {"seeds": [1, 2, 3], "labels": [0, 1, 3], "guidance": 2.0}
    assert torch.equal(sdedit(sampler, images, 0.0, **request), images)
    assert torch.equal(sdedit(sampler, images, 1.0, **request), sampler.sample(**request))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sdedit_denoises_the_image_in_noise(eta, fake_network, images):
    sampler = Sampler(fake_network(), steps=8, eta=eta)
    edited = sdedit(sampler, images, 0.4, seeds=[1, 2, 3])
    level = sampler.schedule.alphas_cumprod[399]
    noisy = level**0.5 * images + (1 - level) ** 0.5 * seeded_noise([1, 2, 3], INITIAL_NOISE, SHAPE)
    expected = Sampler(sampler.model, steps=8, eta=eta).starting_at(399).sample(x_T=noisy.float(), seeds=[1, 2, 3])
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=1e-5)
    alone = torch.cat([sdedit(sampler, images[i : i + 1], 0.4, seeds=[i + 1]) for i in range(3)])
    assert torch.equal(alone, edited) and torch.equal(sdedit(sampler, images, 0.4, seeds=[1, 2, 3], batch_size=2), edited)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("exact", [False, True])
def test_a_swap_to_the_same_class_and_a_move_by_nothing_are_the_reconstruction(exact, strength, sampler, images):
    expected = reconstruction(sampler.starting_at(start_timestep(strength, 1000)), images, labels=2)
    options = {"strength": strength, "exact": exact}
    same = swap_class(sampler, images, source=2, target=2, **options)
    direction = attribute_direction(sampler, images[:1], images[1:], labels=(2, [2, 2]), **options)
    unmoved = move_along(sampler, images, direction, 0.0, labels=2, **options)
    assert torch.equal(same, unmoved)
    torch.testing.assert_close(same, images if exact else expected, atol=2e-4, rtol=1e-4)
    other = swap_class(sampler, images, source=2, target=0, batch_size=2, **options)
    assert not torch.allclose(other, same, atol=1e-2)
    each = [swap_class(sampler, images[i : i + 1], source=2, target=[0], **options) for i in range(3)]
    assert torch.equal(torch.cat(each), other)


def test_a_move_by_the_whole_difference_leads_from_one_image_to_the_other(sampler, images):
    direction = attribute_direction(sampler, images[:1], images[1:2], exact=True)
    moved = move_along(sampler, images[1:2], direction, exact=True)
    torch.testing.assert_close(moved, images[:1], atol=1e-3, rtol=1e-3)
    assert torch.equal(attribute_direction(sampler, images[:1], images[1:2], strength=0), images[0] - images[1])


def test_a_swap_changes_what_the_packaged_model_shows():
    """Ankle boots are taller than sneakers: more of the upper half is bright."""
    sampler = Sampler(UNet.from_pretrained("fashion-mnist"), steps=10)
    sneakers = sampler.sample(seeds=range(6), labels=7, guidance=2.0).clamp(-1, 1)
    boots = swap_class(sampler, sneakers, source=7, target=9, guidance=2.0)
    upper = [(images[:, 0, 4:14] > -0.8).float().mean().item() for images in (sneakers, boots)]
    assert upper[1] > 2 * upper[0]


@pytest.mark.parametrize(
    "edit,message",
    [
        (lambda s, x: sdedit(s, x, 0.5, seeds=[1]), "1 seed for 3 images"),
        (lambda s, x: sdedit(s, x, 2, seeds=[1, 2, 3]), r"strength must lie in \[0, 1\]; got 2"),
        (lambda s, x: swap_class(s, x, source=0, target=9), "class 9 is out of range"),
        (lambda s, x: swap_class(s, x[..., :4], source=0, target=1), "expected images of shape"),
        (lambda s, x: attribute_direction(s, x, x[:0]), "got 3 and 0 of them"),
        (lambda s, x: move_along(s, x, x), r"the direction must be of shape \(3, 8, 8\); got \(3, 3, 8, 8\)"),
        (lambda s, x: move_along(s, x, x[0], float("nan")), "amount must be a finite number"),
    ],
)
def test_what_does_not_fit_is_named(edit, message, sampler, images):
    with pytest.raises(ValueError, match=message):
        edit(sampler, images)


def test_edits_need_a_deterministic_sampler_where_they_encode(fake_network, images):
    with pytest.raises(ValueError, match="encode needs a deterministic sampler"):
        swap_class(Sampler(fake_network(num_classes=4), steps=2, eta=1.0), images, source=0, target=1)
