import numpy as np
import pytest
import torch
from torch import nn

from ddim_fast import NoiseSchedule, Sampler
from ddim_fast.diffusion.request import Request
from ddim_fast.training.loss import ConsistencyLoss, DenoisingLoss

TYPES = ["epsilon", "v_prediction", "sample"]


class Oracle(nn.Module):
    """Knows the images, and is wrong by ``error``."""

    def __init__(self, schedule, prediction_type, images, error=0.0):
        super().__init__()
        self.bars = torch.from_numpy(schedule.alphas_cumprod.copy())
        self.prediction_type, self.images, self.error = prediction_type, images.double(), error

    def forward(self, x, timesteps, labels):
        a = self.bars[timesteps][:, None, None, None]
        eps = (x.double() - a.sqrt() * self.images) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * self.images
        right = {"epsilon": eps, "v_prediction": v, "sample": self.images}[self.prediction_type]
        self.seen = x, timesteps, labels
        return right + self.error


IMAGES = torch.linspace(-1, 1, 4 * 3 * 5 * 5).reshape(4, 3, 5, 5)


def loss_of(schedule, prediction_type, gamma=None, error=0.0, seed=0):
    torch.manual_seed(seed)
    return float(
        DenoisingLoss(schedule, prediction_type, gamma)(Oracle(schedule, prediction_type, IMAGES, error), IMAGES, None)
    )


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_perfect_network_has_no_loss(prediction_type, gamma):
    assert loss_of(NoiseSchedule.linear(), prediction_type, gamma) < 1e-8


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_loss_is_the_mean_squared_error(prediction_type):
    assert loss_of(NoiseSchedule.linear(), prediction_type, error=0.5) == pytest.approx(0.25, rel=1e-3)


def test_each_image_has_the_weight_of_its_own_timestep():
    """The oracle errs in one image alone, whose weight is then all that counts."""
    schedule, error = NoiseSchedule.linear(), torch.zeros(4, 1, 1, 1, dtype=torch.float64)
    error[2] = 0.5
    oracle, loss = Oracle(schedule, "sample", IMAGES, error), DenoisingLoss(schedule, "sample", 5.0)
    for seed in range(4):
        torch.manual_seed(seed)
        value = float(loss(oracle, IMAGES, None))
        weights = loss.weight[oracle.seen[1]]
        assert value == pytest.approx(float(weights[2]) * 0.25 / 4, rel=1e-3) and len(weights.unique()) > 1


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("bar", [0.02, 0.4, 0.5, 0.9, 0.999])
def test_min_snr_weights_are_those_of_hang_et_al(bar, gamma):
    schedule = NoiseSchedule.from_betas([1 - bar])
    snr = bar / (1 - bar)
    expected = {
        "epsilon": min(snr, gamma) / snr,
        "v_prediction": min(snr, gamma) / (snr + 1),
        "sample": min(snr, gamma),
    }
    for prediction_type, weight in expected.items():
        assert loss_of(schedule, prediction_type, gamma, error=1.0) == pytest.approx(weight, rel=1e-4)


def test_each_image_is_weighted_by_its_own_timestep():
    schedule = NoiseSchedule.from_betas([0.1, 0.6, 0.5])
    oracle = Oracle(schedule, "epsilon", IMAGES, error=1.0)
    loss = float(DenoisingLoss(schedule, "epsilon", 1.0)(oracle, IMAGES, None))
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    assert loss == pytest.approx(np.mean((np.minimum(snr, 1) / snr)[oracle.seen[1].numpy()]), rel=1e-4)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_zero_terminal_snr_is_finite(prediction_type, gamma):
    schedule = NoiseSchedule.from_betas([1.0])
    assert schedule.alphas_cumprod[0] == 0
    model = nn.Conv2d(3, 3, 1)
    loss = DenoisingLoss(schedule, prediction_type, gamma)(lambda x, t, labels: model(x), IMAGES, None)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(model.weight.grad).all()
    if gamma is not None:
        assert loss.item() == 0  # no signal: whatever the network says about the image has no weight


def test_the_network_sees_images_noised_to_its_timestep():
    schedule = NoiseSchedule.linear()
    images = torch.full((2000, 1, 1, 1), 0.7)
    oracle = Oracle(schedule, "epsilon", images)
    torch.manual_seed(0)
    DenoisingLoss(schedule, "epsilon")(oracle, images, None)
    x, timesteps, _ = oracle.seen
    assert timesteps.min() < 10 and timesteps.max() > 990 and len(timesteps.unique()) > 800
    a = oracle.bars[timesteps].view_as(x)
    eps = (x.double() - a.sqrt() * 0.7) / (1 - a).sqrt()
    assert abs(float(eps.mean())) < 0.1 and abs(float(eps.std()) - 1) < 0.06


def test_labels_are_handed_on():
    schedule = NoiseSchedule.linear()
    oracle, labels = Oracle(schedule, "epsilon", IMAGES), torch.tensor([3, 1, 2, 0])
    DenoisingLoss(schedule, "epsilon")(oracle, IMAGES, labels)
    assert oracle.seen[2] is labels


def test_the_loss_of_a_narrow_network_is_float32():
    network = nn.Conv2d(3, 3, 1).bfloat16()
    loss = DenoisingLoss(NoiseSchedule.linear(), "epsilon")(lambda x, t, y: network(x.bfloat16()), IMAGES, None)
    assert loss.dtype == torch.float32 and loss.ndim == 0


@pytest.mark.parametrize("gamma", [0.0, -5.0, float("nan")])
def test_gamma_must_be_positive(gamma):
    with pytest.raises(ValueError, match="min_snr_gamma must be positive"):
        DenoisingLoss(NoiseSchedule.linear(), "epsilon", gamma)


# ---- Consistency ----


BATCH = torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)
LABELS = torch.tensor([0, 3, 1, 4])  # the last one is "no label"


def consistency(fake_network, timesteps=(990, 400, 30), prediction_type="v_prediction"):
    teacher = fake_network(prediction_type=prediction_type, num_classes=4)
    return teacher, ConsistencyLoss(teacher, timesteps, torch.float32)


def drawn_by(loss, labels=LABELS):
    torch.manual_seed(0)
    return loss.complete(BATCH, labels, loss.draw(nn.Identity(), BATCH, 4))


@pytest.mark.parametrize("labels", [None, LABELS], ids=["no labels", "labels"])
def test_the_teacher_goes_through_the_timesteps_to_the_image(fake_network, labels):
    teacher, loss = consistency(fake_network)
    starts, ends = drawn_by(loss, labels)
    torch.manual_seed(0)
    level = NoiseSchedule.linear().alphas_cumprod[990]
    x = level**0.5 * BATCH + (1 - level) ** 0.5 * torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(starts[:, 0], x.float())
    ten = Sampler(teacher, solver="unipc", steps=10).timesteps.tolist()
    sampler = Sampler(teacher, solver="unipc", steps=None, spacing=sorted({990, 400, 30, *(t for t in ten if t < 990)}))
    request = Request(None, x.float(), labels)  # as a sampler's caller could not ask for it: labels, and none
    states = [*sampler._loop.trajectory(request, sampler.timesteps)]
    before = {int(t): state.x for t, state in zip(sampler.timesteps[1:], states, strict=False)}
    assert torch.equal(ends, states[-1].x)
    assert torch.equal(starts[:, 1], before[400]) and torch.equal(starts[:, 2], before[30])
    assert not any(t.requires_grad or t.is_inference() for t in (starts, ends))


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_loss_is_the_mean_distance_to_the_teachers_images(fake_network, prediction_type):
    _, loss = consistency(fake_network, prediction_type=prediction_type)
    drawn, schedule = drawn_by(loss), NoiseSchedule.linear()
    ends, seen = drawn[1].repeat_interleave(3, dim=0), []

    def student(error):
        def network(x, timesteps, labels):
            seen.append((timesteps.tolist(), labels.tolist()))
            a = torch.tensor(schedule.alphas_cumprod)[timesteps].view(-1, 1, 1, 1)
            x0 = ends + error.reshape(-1, 1, 1, 1)
            eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
            return {"epsilon": eps, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0, "sample": x0}[prediction_type]

        return network

    assert float(loss(student(torch.zeros(12)), BATCH, LABELS, drawn)) < 1e-6
    error, numbers = torch.linspace(0, 0.1, 12), 3 * 8 * 8
    soft = 0.03 * numbers**0.5
    expected = ((numbers * error**2 + soft**2).sqrt() - soft).mean()
    assert float(loss(student(error), BATCH, LABELS, drawn)) == pytest.approx(float(expected), rel=1e-4)
    assert seen[0] == ([990, 400, 30] * 4, [0, 0, 0, 3, 3, 3, 1, 1, 1, 4, 4, 4])


def test_the_teacher_is_not_trained(fake_network):
    teacher, loss = consistency(fake_network)
    student = fake_network(prediction_type="v_prediction", num_classes=4)
    loss(student, BATCH, LABELS).backward()
    assert student.weight.grad.abs().sum() > 0 and teacher.weight.grad is None


@pytest.mark.parametrize("timesteps", [(1000, 400), (1000,)])
def test_the_timesteps_are_the_networks(fake_network, timesteps):
    with pytest.raises(ValueError, match=r"timesteps must lie in 0\.\.999; got \d+\.\.1000"):
        consistency(fake_network, timesteps)
