import pytest
import torch
from torch import nn

from ddim_fast.training.ema import EMA


def model_with(value: float) -> nn.Linear:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


def set_to(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def test_the_average_follows_its_formula():
    model = model_with(1.0)
    ema = EMA(model, 0.5)
    expected = 1.0
    for step, value in enumerate([4.0, -2.0, 0.5, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0]):
        set_to(model, value)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        for tensor in ema.state_dict().values():
            torch.testing.assert_close(tensor, torch.full_like(tensor, expected))


def test_late_in_training_the_decay_is_the_one_asked_for():
    model = model_with(0.0)
    ema = EMA(model, 0.999)
    set_to(model, 1.0)
    ema.update(1_000_000)
    torch.testing.assert_close(ema.state_dict()["weight"], torch.full((2, 2), 0.001), rtol=1e-4, atol=0)


def test_a_short_run_is_not_its_initialisation():
    model = model_with(100.0)
    ema = EMA(model, 0.9999)
    set_to(model, 1.0)
    for step in range(50):
        ema.update(step)
    assert abs(float(ema.state_dict()["bias"][0]) - 1) < 0.01


def test_the_model_is_not_touched():
    model = model_with(3.0)
    ema = EMA(model, 0.9)
    ema.state_dict()["weight"].zero_()
    ema.update(0)
    assert (model.weight == 3).all() and model.weight.requires_grad
    assert set(ema.state_dict()) == set(model.state_dict())
    assert not any(t.requires_grad for t in ema.state_dict().values())


def test_a_saved_average_goes_on():
    one, other = model_with(1.0), model_with(7.0)
    ema, resumed = EMA(one, 0.9), EMA(other, 0.9)
    set_to(one, 2.0)
    ema.update(0)
    resumed.load_state_dict(ema.state_dict())
    set_to(other, 2.0)
    for average in (ema, resumed):
        average.update(1)
    for name, tensor in ema.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)
    assert (other.weight == 2).all()


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_the_decay_is_below_one(decay):
    with pytest.raises(ValueError, match=r"EMA decay must be in \[0, 1\)"):
        EMA(model_with(0.0), decay)
