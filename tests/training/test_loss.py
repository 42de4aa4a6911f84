import numpy as np
import pytest
import torch
from torch import nn

from ddim_fast import NoiseSchedule
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


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_network_that_leads_from_every_level_to_the_image_is_consistent(prediction_type):
    schedule = NoiseSchedule.linear()
    oracle = Oracle(schedule, prediction_type, IMAGES)
    assert float(ConsistencyLoss(schedule, prediction_type)(oracle, IMAGES, None)) < 1e-2


@pytest.mark.parametrize("below", [0, 300])
def test_consistency_is_the_distance_of_both_images_over_that_of_the_levels(below):
    """The oracle is wrong by another number at each timestep; entry 0 is the image itself, whatever the network says."""
    schedule = NoiseSchedule.linear()
    loss, oracle = ConsistencyLoss(schedule, "sample"), Oracle(schedule, "sample", IMAGES)
    error = lambda t: 0.001 * (t + 1).reshape(-1, 1, 1, 1)  # noqa: E731
    network = lambda x, t, labels: oracle(x, t, labels) + error(t)  # noqa: E731
    drawn = torch.full((4,), 700), torch.full((4,), below), torch.randn(4, 3, 5, 5)
    sigma = np.sqrt(1 / schedule.alphas_cumprod - 1)
    numbers, soft = 3 * 5 * 5, 0.00054 * 75**0.5
    distance = (numbers * (0.001 * (700 - below)) ** 2 + soft**2) ** 0.5 - soft
    expected = distance / (sigma[699] - (sigma[below - 1] if below else 0.0))
    assert float(loss(network, IMAGES, None, drawn)) == pytest.approx(expected, rel=1e-4)


def test_the_lower_level_is_a_target_without_a_gradient():
    schedule, factor = NoiseSchedule.linear(), torch.ones((), requires_grad=True)
    loss, seen = ConsistencyLoss(schedule, "sample"), []

    def network(x, t, labels):
        seen.append((torch.is_grad_enabled(), t, x))
        return factor * x

    drawn = torch.tensor([900, 500, 20, 2]), torch.tensor([700, 100, 0, 1]), torch.randn(4, 3, 5, 5)
    loss(network, IMAGES, None, drawn).backward()
    (above_learns, above, x), (below_learns, below, _) = seen
    assert (above_learns, below_learns) == (True, False)
    assert above.tolist() == [899, 499, 19, 1] and below.tolist() == [699, 99, 0, 0]
    # The gradient of the distance by the upper image alone, times its derivative by the factor: x.
    signal, sigma = (f(torch.from_numpy(schedule.alphas_cumprod.copy())) for f in (torch.sqrt, lambda a: (1 - a).sqrt()))
    target = torch.stack(
        [IMAGES[i] if b == 0 else signal[b - 1] * IMAGES[i] + sigma[b - 1] * drawn[2][i] for i, b in enumerate(drawn[1])]
    )
    gap, soft = x - target, 0.00054 * 75**0.5
    levels = loss.levels[drawn[0]] - loss.levels[drawn[1]]
    norms = (gap.square().sum((1, 2, 3)) + soft**2).sqrt()
    expected = ((gap * x).sum((1, 2, 3)) / norms / levels).mean()
    assert float(factor.grad) == pytest.approx(float(expected), rel=1e-4)


def test_the_levels_close_up_during_the_training():
    loss = ConsistencyLoss(NoiseSchedule.linear(), "epsilon")
    ratios = []
    for done in (0.0, 0.2, 0.6, 0.999, 1.0):
        torch.manual_seed(0)
        above, below, noise = loss.draw(nn.Identity(), IMAGES, 20_000, done)
        assert noise.shape == (20_000, 3, 5, 5) and int(below.min()) == 0 and bool((below < above).all())
        assert (int(above.min()), int(above.max())) == (1, 1000)
        high = loss.levels[above] > 20  # where the share is 1 - 2^-k
        ratios.append(float((loss.levels[below] / loss.levels[above])[high].mean()))
    assert ratios[0] == pytest.approx(0.5, abs=0.01) and ratios[1] == pytest.approx(0.75, abs=0.01)
    assert ratios == sorted(ratios) and ratios[-1] == ratios[-2] > 0.97


def test_consistency_needs_finite_noise():
    with pytest.raises(ValueError, match="consistency needs a schedule without zero terminal SNR"):
        ConsistencyLoss(NoiseSchedule.linear().rescale_zero_terminal_snr(), "v_prediction")
