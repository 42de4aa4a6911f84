import itertools

import numpy as np
import pytest
import torch

from ddim_fast import NoiseSchedule, Sampler, UNet
from ddim_fast.diffusion.adaptive import cheapest_paths, fit_timesteps, step_errors, whitening
from ddim_fast.models.checkpoint import load_timesteps, save_timesteps

T = 30


def test_the_paths_are_the_cheapest_of_all():
    random = np.random.default_rng(0)
    cost = random.uniform(size=(7, 8))
    cost[np.tril_indices(7, 0, 8)] = np.inf
    start = random.uniform(size=7)
    paths = cheapest_paths(cost, start, 7)
    for steps in range(1, 8):

        def total(path):
            return start[path[0]] + sum(cost[a, b] for a, b in itertools.pairwise([*path, 7]))

        best = min(itertools.combinations(range(7), steps), key=total)
        assert total(paths[steps]) == pytest.approx(total(best)) and paths[steps] == sorted(paths[steps])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_step_errors_are_those_of_the_samplers_steps(prediction_type, fake_network):
    network = fake_network(prediction_type=prediction_type, num_train_timesteps=T, beta_end=0.3)
    schedule = NoiseSchedule.from_config(network.config)
    states = list(Sampler(network, steps=T, spacing="linear").trajectory(seeds=[0, 1]))
    x = torch.stack([*(state.before for state in states), states[-1].x])
    output = torch.stack([state.output for state in states])
    errors, start, error_of = step_errors(x, output, schedule, prediction_type)
    assert np.isinf(errors[5, :6]).all() and np.isfinite(errors[5, 6:]).all()
    assert start[0] == 0 and start[4] == pytest.approx((x[0] - x[4]).square().mean().sqrt().item(), rel=1e-5)
    for i, j in [(0, 5), (3, 20), (29, 30), (10, 30)]:
        visited = [T - 1 - i] if j == T else [T - 1 - i, T - 1 - j]
        one = next(Sampler(network, steps=None, spacing=visited).trajectory(x_T=x[i]))
        torch.testing.assert_close(error_of(i, j), one.x - x[j], atol=2e-5, rtol=0)
        assert errors[i, j] == pytest.approx((one.x - x[j]).square().mean().sqrt().item(), abs=2e-5)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 24, 8)])
def test_whitening_counts_frequencies_relative_to_the_images(shape):
    torch.manual_seed(0)
    noise = torch.randn(256, *shape)
    smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    torch.testing.assert_close(whitening(smooth, 0.0)(noise).square().sum(), noise.square().sum())
    plain, half, white = (whitening(smooth, share)(smooth).square().mean(dim=(0, 1)) for share in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half.square(), plain * white)
    assert white.mean().item() == pytest.approx(1)

    def low_over_high(power):
        height, width = shape[1] // 2, shape[2] // 2
        return (power[:height, :width].mean() / power[height:, width:].mean()).item()

    assert low_over_high(plain) > 20 and 0.5 < low_over_high(white) < 2.5
    nothing = torch.zeros(4, *shape)
    assert torch.isfinite(whitening(nothing, 1.0)(noise)).all()


def test_fitted_timesteps_beat_those_of_formulas(fake_network):
    network = fake_network(num_train_timesteps=60, beta_end=0.3)
    reports = []
    fitted = fit_timesteps(network, seeds=range(100, 108), most=25, on_step=lambda *report: reports.append(report))
    assert fitted.keys() == {"ddim", "dpm-solver++", "unipc"}
    for runs in fitted.values():
        assert list(runs) == list(range(1, 26)) and all(len(run) == steps for steps, run in runs.items())
    assert [done for done, _ in reports] == list(range(1, len(reports) + 1))  # each evaluation
    assert len({total for _, total in reports}) == 1 and 0.5 < len(reports) / reports[0][1] <= 1
    exact = Sampler(network, steps=60, spacing="linear").sample(seeds=range(16))
    whiten = whitening(exact, 1.0)

    def errors(solver, steps, spacing):
        missed = Sampler(network, steps=steps, spacing=spacing, solver=solver).sample(seeds=range(16)) - exact
        return np.array([missed.square().mean().sqrt().item(), whiten(missed).square().mean().sqrt().item()])

    network.fitted_timesteps = fitted
    for solver in fitted:
        for steps in (3, 5, 10):
            adaptive = errors(solver, steps, "adaptive")
            assert (adaptive == errors(solver, None, fitted[solver][steps])).all()
            assert (adaptive <= 1.02 * errors(solver, steps, "quadratic")).all()
            assert adaptive[0] <= 1.02 * min(errors(solver, steps, s)[0] for s in ("linear", "quadratic", "trailing"))
        assert (errors(solver, 5, "adaptive") < 0.9 * errors(solver, 5, "quadratic")).all()
    assert Sampler(network, steps=5, spacing="adaptive", solver="ddpm").timesteps.tolist() == fitted["ddim"][5]


def test_a_model_without_a_fit_says_how_to_get_one(fake_network):
    network = fake_network()
    with pytest.raises(ValueError, match=r"python -m ddim_fast\.evaluate --fit-timesteps"):
        Sampler(network, spacing="adaptive")
    network.fitted_timesteps = {"ddim": {1: [999], 2: [999, 3]}}
    with pytest.raises(ValueError, match="for 1 to 2 steps; got 20"):
        Sampler(network, spacing="adaptive")
    with pytest.raises(ValueError, match=r"python -m ddim_fast\.evaluate --fit-timesteps"):
        Sampler(network, spacing="adaptive", solver="unipc")


def test_a_fit_lies_beside_the_checkpoint_and_goes_with_its_weights(small_unet, tmp_path):
    small_unet.save_pretrained(tmp_path / "m")
    fitted = {"ddim": {1: [999], 2: [999, 400]}, "unipc": {2: [998, 300]}}
    file = save_timesteps(tmp_path / "m", fitted, {"seeds": "0-3"})
    assert file == tmp_path / "m" / "timesteps.json" and load_timesteps(tmp_path / "m", 1000) == fitted
    model = UNet.from_pretrained(tmp_path / "m")
    assert model.fitted_timesteps == fitted
    assert Sampler(model, steps=2, spacing="adaptive").timesteps.tolist() == [999, 400]
    assert Sampler(model, steps=2, spacing="adaptive", solver="unipc").timesteps.tolist() == [998, 300]
    small_unet.save_pretrained(tmp_path / "m")  # other weights, as far as anyone knows
    assert UNet.from_pretrained(tmp_path / "m").fitted_timesteps is None

    (tmp_path / "weights.ckpt").write_bytes(b"")
    assert save_timesteps(tmp_path / "weights.ckpt", fitted, {}).name == "weights.ckpt.timesteps.json"
    assert load_timesteps(tmp_path / "weights.ckpt", 1000) == fitted


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"timesteps": {"1": [999]}}',
        '{"timesteps": {"ddim": {"2": [3, 999]}}}',
        '{"timesteps": {"ddim": {"1": [1000]}}}',
        '{"timesteps": {"ddim": {"3": [2, 1]}}}',
        '{"timesteps": {"ddim": {"1": [true]}}}',
    ],
)
def test_a_damaged_fit_is_named(text, small_unet, tmp_path):
    small_unet.save_pretrained(tmp_path)
    (tmp_path / "timesteps.json").write_text(text)
    with pytest.raises(ValueError, match=r"timesteps\.json"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("total", [1, 2, 6])
def test_models_of_few_timesteps_are_fitted_too(total, fake_network, capsys):
    fitted = fit_timesteps(fake_network(num_train_timesteps=total), seeds=range(4), progress=total == 6)
    assert ("network evaluations" in capsys.readouterr().err) == (total == 6)
    for by_steps in fitted.values():
        assert list(by_steps) == list(range(1, total + 1)) and by_steps[total] == list(range(total))[::-1]
