import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler

from ddim_fast import NoiseSchedule, UNetConfig

RANGES = [(1e-4, 0.02, 1000), (0.00085, 0.012, 1000), (1e-4, 0.02, 100), (1e-3, 0.2, 77)]


def _theirs(cls=DDIMScheduler, **options):
    return cls(**options).alphas_cumprod.numpy()


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
@pytest.mark.parametrize("start,end,steps", RANGES)
def test_equals_diffusers_bit_for_bit(name, start, end, steps):
    ours = NoiseSchedule.from_name(name, start, end, steps).alphas_cumprod.astype(np.float32)
    np.testing.assert_array_equal(ours, _theirs(beta_schedule=name, beta_start=start, beta_end=end, num_train_timesteps=steps))


@pytest.mark.parametrize("steps", [1000, 100, 77])
def test_cosine_equals_diffusers_bit_for_bit(steps):
    ours = NoiseSchedule.cosine(steps).alphas_cumprod.astype(np.float32)
    np.testing.assert_array_equal(ours, _theirs(beta_schedule="squaredcos_cap_v2", num_train_timesteps=steps))


def test_sigmoid_equals_diffusers_to_rounding():
    theirs = DDPMScheduler(beta_schedule="sigmoid", beta_start=1e-4, beta_end=0.02)
    ours = NoiseSchedule.sigmoid(1e-4, 0.02)
    np.testing.assert_array_almost_equal_nulp(ours.betas.astype(np.float32), theirs.betas.numpy(), nulp=2)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "name,theirs", [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_zero_terminal_snr_equals_diffusers(name, theirs):
    ours = NoiseSchedule.from_name(name).rescale_zero_terminal_snr().alphas_cumprod
    assert ours[-1] == 0
    np.testing.assert_allclose(
        ours,
        _theirs(beta_schedule=theirs, beta_start=1e-4, beta_end=0.02, rescale_betas_zero_snr=True),
        rtol=2e-5,
        atol=1e-12,
    )


def test_trained_betas_equal_diffusers():
    betas = np.linspace(0.01, 0.3, 20) ** 1.5
    ours = NoiseSchedule.from_betas(betas)
    np.testing.assert_array_equal(ours.alphas_cumprod.astype(np.float32), _theirs(trained_betas=betas, num_train_timesteps=20))


def test_linear_is_the_papers_formula():
    betas = np.linspace(1e-4, 0.02, 1000)
    schedule = NoiseSchedule.linear()
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=2e-6)
    assert schedule.alphas_cumprod.dtype == np.float64
    np.testing.assert_allclose(schedule.log_snr, np.log(schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)), rtol=1e-9)


def test_every_schedule_falls():
    for name in ("linear", "scaled_linear", "cosine", "sigmoid"):
        assert np.all(np.diff(NoiseSchedule.from_name(name).alphas_cumprod) < 0)


def test_config_names_the_schedule():
    config = UNetConfig.preset("cifar10-64", beta_schedule="cosine", rescale_betas_zero_snr=True, num_train_timesteps=50)
    expected = NoiseSchedule.cosine(50).rescale_zero_terminal_snr()
    np.testing.assert_array_equal(NoiseSchedule.from_config(config).betas, expected.betas)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: NoiseSchedule.from_name("quadratic"), "unknown beta_schedule 'quadratic'"),
        (lambda: NoiseSchedule.linear(-0.1, 0.02), "between 0 and 1"),
        (lambda: NoiseSchedule.linear(1e-4, 0.02, 0), "num_train_timesteps must be at least 1"),
        (lambda: NoiseSchedule.from_betas([0.1, 1.2]), r"betas must all lie in \[0, 1\]"),
        (lambda: NoiseSchedule.from_betas([0.1, float("nan")]), r"betas must all lie in \[0, 1\]"),
        (lambda: NoiseSchedule.from_betas([1.0, 0.1]), "only the last beta may be 1"),
        (lambda: NoiseSchedule.from_betas([]), "non-empty"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_shows_itself_on_one_line():
    assert repr(NoiseSchedule.linear()) == "NoiseSchedule(1000 timesteps, betas 0.0001 to 0.02, last alphas_cumprod 4.04e-05)"


def test_the_schedule_cannot_be_changed():
    with pytest.raises(ValueError):
        NoiseSchedule.linear().alphas_cumprod[0] = 1
