import json

import numpy as np
import pytest
import torch

from ddim_fast import Sampler, UNet
from ddim_fast.diffusion.fitting import _Images, fit_solver
from ddim_fast.models.checkpoint import load_coefficients, save_timesteps

ROWS = [[1.0, -0.5, 1.0, 0.0, 0.0, 0.0, 0.9, 0.1, 0.0], [1.1, -0.4, 0.9, 0.1, 0.05, 0.05, 0.3, 0.8, -0.1]]


@pytest.fixture
def fitted(fake_network):
    network = fake_network(num_train_timesteps=200, beta_end=0.1)
    return network, fit_solver(network, 4, seeds=range(100, 132))


def images(network, fitted, **options):
    network.fitted_timesteps = {"fitted": {len(fitted.timesteps): fitted.timesteps}}
    network.fitted_coefficients = {len(fitted.timesteps): fitted.coefficients}
    return Sampler(network, steps=len(fitted.timesteps), solver="fitted", **options).sample(seeds=range(8))


def test_a_fitted_solver_is_nearer_to_the_teacher_on_other_noise(fitted):
    network, solver = fitted
    assert solver.after < 0.7 * solver.before
    assert len(solver.timesteps) == 4 and np.array(solver.coefficients).shape == (4, 9)
    assert sorted(set(solver.timesteps), reverse=True) == solver.timesteps
    teacher, unipc = (Sampler(network, steps=n, solver="unipc").sample(seeds=range(8)) for n in (20, 4))
    assert (images(network, solver) - teacher).square().mean() < 0.7 * (unipc - teacher).square().mean()


def test_the_same_fit_gives_the_same_table_and_leaves_the_network_as_it_is(small_unet):
    before = {name: value.clone() for name, value in small_unet.state_dict().items()}
    options = {"seeds": range(8), "labels": range(8), "guidance": 1.5, "teacher_steps": 5, "iterations": 3}
    one, two = (fit_solver(small_unet, 2, **options) for _ in range(2))
    assert one == two and one.after <= one.before
    assert all(torch.equal(value, before[name]) for name, value in small_unet.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in small_unet.parameters())


def test_no_fit_is_worse_than_its_start(fake_network, monkeypatch):
    found = _Images.normal_equations
    monkeypatch.setattr(_Images, "normal_equations", lambda *a: (found(*a)[0], -found(*a)[1]))  # every move leads away
    network = fake_network(num_train_timesteps=50, beta_end=0.3)
    solver = fit_solver(network, 3, seeds=range(16), teacher_steps=10, iterations=4)
    unipc = Sampler(network, steps=3, solver="unipc")
    assert solver.after == solver.before and solver.timesteps == unipc.timesteps.tolist()
    torch.testing.assert_close(images(network, solver), unipc.sample(seeds=range(8)), rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["eager", "captured"])
def test_the_table_serves_every_engine(small_unet, engine):
    request = {"seeds": [1, 2, 3], "labels": [0, 5, 9], "guidance": 1.5}
    unipc = Sampler(small_unet, steps=3, solver="unipc")
    small_unet.fitted_timesteps = {"fitted": {3: unipc.timesteps.tolist()}}
    small_unet.fitted_coefficients = {3: unipc.solver.table.tolist()}
    sampler = Sampler(small_unet, steps=3, solver="fitted", spacing="linear", engine=engine)
    assert sampler.timesteps.tolist() == unipc.timesteps.tolist()
    torch.testing.assert_close(sampler.sample(**request), unipc.sample(**request), rtol=1e-5, atol=1e-5)
    states = list(sampler.trajectory(**request))
    torch.testing.assert_close(states[1].x0, list(unipc.trajectory(**request))[1].x0, rtol=1e-5, atol=1e-5)


def test_what_a_fitted_solver_cannot_do(small_unet, fake_network):
    with pytest.raises(ValueError, match=r"solver fitted: none has been fitted to this model; .* --fit-solver"):
        Sampler(small_unet, steps=5, solver="fitted")
    small_unet.fitted_timesteps, small_unet.fitted_coefficients = {"fitted": {2: [700, 3]}}, {2: ROWS}
    with pytest.raises(ValueError, match="solver fitted: the one fitted to this model is for 2 steps; got 5"):
        Sampler(small_unet, steps=5, solver="fitted")
    with pytest.raises(ValueError, match="eta is an option of the ddim solver"):
        Sampler(small_unet, steps=2, solver="fitted", eta=0.5)
    with pytest.raises(ValueError, match="the solver fitted starts from noise"):
        Sampler(small_unet, steps=2, solver="fitted").starting_at(500)
    network = fake_network()
    with pytest.raises(ValueError, match="2 steps or more, and fewer than its teacher's 20; got 20"):
        fit_solver(network, 20, seeds=range(8))
    with pytest.raises(ValueError, match="the noise of 4 seeds or more; got 3"):
        fit_solver(network, 5, seeds=range(3))


def test_a_fitted_solver_lies_beside_the_checkpoint(small_unet, tmp_path):
    small_unet.save_pretrained(tmp_path)
    file = save_timesteps(tmp_path, {"ddim": {1: [999]}, "fitted": {2: [700, 3]}}, {}, {2: ROWS})
    model = UNet.from_pretrained(tmp_path)
    assert model.fitted_coefficients == {2: ROWS} and model.fitted_timesteps["fitted"] == {2: [700, 3]}
    assert np.array_equal(Sampler(model, steps=2, solver="fitted").solver.table, np.array(ROWS, np.float32))
    whole = json.loads(file.read_text())
    for damaged in ({"2": ROWS[:1]}, {"2": [ROWS[0], ROWS[1][:8]]}, {"2": [ROWS[0], [float("nan")] * 9]}, {}, [], {"x": ROWS}):
        file.write_text(json.dumps(whole | {"coefficients": damaged}))
        with pytest.raises(ValueError, match=r"timesteps\.json.*(coefficients of a fitted solver|the same numbers of steps)"):
            load_coefficients(tmp_path)
