import dataclasses

import pytest
import torch

from ddim_fast import UNet
from ddim_fast.data.images import ImageSet
from ddim_fast.training.loop import Trainer
from ddim_fast.training.muon import Muon
from ddim_fast.training.options import TrainingOptions


@pytest.fixture
def make_trainer(small_config):
    """A function making a trainer of a tiny network with Muon; keywords are further options."""
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def make(**options) -> Trainer:
        torch.manual_seed(0)
        data = ImageSet(images, torch.arange(8))
        fixed = {"steps": 4, "batch_size": 4, "warmup": 0, "lr": 1e-3, "optimizer": "muon"}
        return Trainer(UNet(small_config), data, TrainingOptions(**{**fixed, **options}))

    return make


def test_hidden_weights_get_orthogonal_updates_of_adams_size(make_trainer):
    trainer = make_trainer()
    for p in trainer.model.parameters():  # a fresh network's zeros have no gradients before them
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    name = "mid_block.resnets.0.conv1.weight"
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    next(trainer.run())
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(after[key], weight) for key, weight in before.items() if "bias" not in key)
    update = (after[name] - before[name]).detach().flatten(1)
    values = torch.linalg.svdvals(update / (1e-3 * 0.2 * max(update.shape) ** 0.5))
    assert values.min() > 0.5 and values.max() < 1.5  # of a gradient they would be thousands apart
    adam = (after["conv_in.weight"] - before["conv_in.weight"]).detach().abs() / 1e-3
    torch.testing.assert_close(adam, torch.ones_like(adam), atol=0.05, rtol=0)  # Adam's first step


def test_all_parameters_are_in_one_of_the_two(make_trainer):
    trainer = make_trainer()
    adam, muon = (group["params"] for group in trainer.optimizer.param_groups)
    assert sum(p.numel() for p in (*adam, *muon)) == sum(p.numel() for p in trainer.model.parameters())
    places = {p.data_ptr() for p in trainer.model.parameters()}
    assert {p.data_ptr() for p in (*adam, *muon)} == places and all(p.ndim == 2 for p in muon)


def test_a_run_resumes_bit_for_bit(make_trainer, tmp_path):
    whole = make_trainer()
    for _ in whole.run():
        pass
    first = make_trainer()
    steps = first.run()
    next(steps), next(steps)
    first.save(tmp_path)
    second = make_trainer()
    second.load(tmp_path)
    for _ in second.run():
        pass
    assert second.step == 4
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_of_adam_is_refused(make_trainer, tmp_path):
    adam = make_trainer(optimizer="adam")
    next(adam.run())
    adam.save(tmp_path)
    with pytest.raises(ValueError, match="the training state of another network"):
        make_trainer().load(tmp_path)


@pytest.mark.parametrize("good", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(make_trainer, good):
    """Whether or not there was momentum before."""
    trainer = make_trainer()
    steps = trainer.run()
    for _ in range(good):
        next(steps)

    def state():
        kept = [t for of in trainer.optimizer.state_dict()["state"].values() for t in of.values() if t.any()]
        return [t.clone() for t in (*trainer.model.parameters(), *kept)]

    before = state()
    with torch.no_grad():
        trainer.data.images[:] = 0
        lost = trainer._loss_of_batch
        trainer._loss_of_batch = lambda *arguments: lost(*arguments) * torch.nan
    assert next(steps).loss.isnan()
    after = state()
    assert len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_gradients_are_cleared(make_trainer):
    trainer = make_trainer()
    next(trainer.run())
    assert isinstance(trainer.optimizer, Muon)
    trainer.optimizer.zero_grad()
    assert all(p.grad is None for p in trainer.model.parameters())


def test_the_option_has_two_values():
    with pytest.raises(ValueError, match="optimizer must be adam or muon; got 'sgd'"):
        dataclasses.replace(TrainingOptions(), optimizer="sgd")
