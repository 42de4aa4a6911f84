import pytest
import torch

from ddim_fast import Sampler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_smaller_tolerance_is_closer_to_the_solution(prediction_type, fake_network):
    network = fake_network(prediction_type=prediction_type, beta_end=0.005)
    exact = Sampler(network, steps=1000, spacing="linear").sample(seeds=range(4))
    errors, evaluations = [], []
    for tolerance in (0.1, 0.01, 0.001):
        sampler = Sampler(network, tolerance=tolerance)
        errors.append((sampler.sample(seeds=range(4)) - exact).square().mean().sqrt().item())
        evaluations.append(sampler.evaluations.float().mean().item())
    assert evaluations[0] < evaluations[1] < evaluations[2] < 200
    assert errors[2] < errors[0] / 3 and errors[2] < 0.02 * exact.std()


def test_an_image_does_not_depend_on_its_batch(small_unet):
    sampler = Sampler(small_unet, tolerance=0.03)
    together = sampler.sample(seeds=range(5), labels=range(5))
    evaluations = sampler.evaluations
    assert evaluations.min() >= 2 and len(evaluations) == 5
    for size in (1, 2):
        assert torch.equal(sampler.sample(seeds=range(5), labels=range(5), batch_size=size), together)
        assert torch.equal(sampler.evaluations, evaluations)
    assert torch.equal(sampler.sample(seeds=[3], labels=[3]), together[3:4])


def test_guidance_is_counted_and_guides(small_unet):
    sampler = Sampler(small_unet, tolerance=0.05)
    plain = sampler.sample(seeds=[0, 1], labels=[1, 2])
    assert torch.equal(sampler.sample(seeds=[0, 1], labels=[1, 2], guidance=1.0), plain)
    guided = sampler.sample(seeds=[0, 1], labels=[1, 2], guidance=3.0)
    assert not torch.allclose(guided, plain) and (sampler.evaluations % 2 == 0).all()


def test_fixed_steps_count_their_evaluations_too(small_unet):
    sampler = Sampler(small_unet, steps=3)
    assert sampler.evaluations is None
    sampler.sample(seeds=[0, 1], labels=[0, 0], guidance=2.0)
    assert sampler.evaluations.tolist() == [6, 6]


@pytest.mark.parametrize(
    "options,words",
    [
        ({"tolerance": 0}, "positive number; got 0"),
        ({"tolerance": "small"}, "positive number"),
        ({"engine": "compiled"}, "the compiled engine needs fixed steps"),
        ({"engine": "captured"}, "the captured engine"),
        ({"reuse": 2}, "reuse=2 needs fixed steps"),
        ({"eta": 1.0}, "eta must be 0"),
        ({"solver": "unipc"}, "solver ddim; got"),
    ],
)
def test_what_does_not_go_with_a_tolerance_is_refused(options, words, small_unet):
    with pytest.raises(ValueError, match=words):
        Sampler(small_unet, **{"tolerance": 0.1, **options})


def test_there_are_no_common_steps(small_unet):
    sampler = Sampler(small_unet, tolerance=0.1)
    for ask in (
        lambda: sampler.trajectory(seeds=[0]),
        lambda: sampler.sample(seeds=[0], on_step=print),
        lambda: sampler.encode(torch.zeros(1, 1, 16, 16)),
    ):
        with pytest.raises(ValueError, match="steps"):
            ask()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_ends_and_spoils_no_other_image(bad, fake_network):
    network = fake_network(num_classes=4)
    forward = network.forward
    network.forward = lambda x, t, labels: torch.where(labels[:, None, None, None] == 2, bad, forward(x, t, labels))
    sampler = Sampler(network, tolerance=0.05)
    images = sampler.sample(seeds=[0, 1], labels=[2, 1])
    assert not images[0].isfinite().all()
    assert torch.equal(images[1], sampler.sample(seeds=[1], labels=1)[0])
