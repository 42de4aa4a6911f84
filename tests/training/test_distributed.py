"""A batch that several processes share, or that is computed in slices."""

import math

import pytest
import torch

from ddim_fast.training.loop import TrainingOptions
from tests.helpers.ranks import trained
from tests.training.test_loop import make_data, make_model, make_trainer

# No dropout, whose masks depend on the slices.
PLAIN = """
def make(processes, accumulate):
    options = dict(steps=50, batch_size=12, accumulate=accumulate, flip=True, label_dropout=0.3, lr_schedule="cosine", ema=0.9)
    options["held_out"] = make_data(200, labels=[i % 3 for i in range(200)])
    model = make_model(processes.rank, num_classes=3)  # the first process's weights become all's
    return make_trainer(make_data(10, labels=[i % 3 for i in range(10)]), model, processes=processes, **options)
"""

# The second of two processes meets an image that is not finite, in step 2 of an epoch of two.
NOT_FINITE = """
def make(processes, accumulate):
    data = ImageSet(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), None)
    trainer = make_trainer(data, processes=processes, steps=4, batch_size=4, accumulate=accumulate)
    data.images[trainer.indices(1)[3]] = torch.nan
    return trainer
"""

DROPOUT = """
def make(processes, accumulate):
    model = make_model(0, dropout=0.5)
    return make_trainer(make_data(10), model, processes=processes, steps=5, batch_size=8, accumulate=accumulate)
"""


def relative_error(state, expected) -> float:
    """The largest over all tensors, of the norms."""
    return max(float((state[n] - tensor).norm() / tensor.norm()) for n, tensor in expected.items())


@pytest.mark.parametrize("layouts", [[(2, 1)], pytest.param([(1, 4), (4, 1), (2, 2)], marks=pytest.mark.slow)], ids=str)
def test_the_weights_do_not_depend_on_the_layout(layouts, tmp_path):
    trained(PLAIN, [(1, 1), *layouts], tmp_path)
    runs = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    one = runs["1x1-0"]
    for count, accumulate in layouts:
        first, *others = [runs[f"{count}x{accumulate}-{rank}"] for rank in range(count)]
        assert relative_error(first["model"], one["model"]) < 1e-5
        assert relative_error(first["ema"], one["ema"]) < 1e-5
        torch.testing.assert_close(torch.tensor(first["steps"]), torch.tensor(one["steps"]), rtol=1e-4, atol=0)
        assert first["steps"] != one["steps"]  # it was computed otherwise
        assert first["validation"] == pytest.approx(one["validation"], rel=1e-5)
        for other in others:  # the same to the bit in all processes
            assert other["steps"] == first["steps"] and other["validation"] == first["validation"]
            assert all(torch.equal(other["model"][name], tensor) for name, tensor in first["model"].items())


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_process_is_passed_over_by_all(tmp_path):
    trained(NOT_FINITE, [(2, 1)], tmp_path)
    first, second = (torch.load(tmp_path / f"2x1-{rank}.pt") for rank in range(2))
    assert [math.isfinite(sum(step)) for step in first["steps"]][:2] == [True, False]
    assert str(first["steps"]) == str(second["steps"])  # nan is not nan
    for name, tensor in first["model"].items():
        assert tensor.isfinite().all() and torch.equal(tensor, second["model"][name])


@pytest.mark.slow
def test_the_masks_of_dropout_depend_on_the_number_of_slices_alone(tmp_path):
    trained(DROPOUT, [(1, 1), (1, 4), (4, 1), (2, 2)], tmp_path)
    whole, *sliced = [torch.load(tmp_path / f"{name}-0.pt")["model"] for name in ("1x1", "1x4", "4x1", "2x2")]
    assert relative_error(sliced[0], whole) > 1e-3
    assert max(relative_error(other, sliced[0]) for other in sliced[1:]) < 1e-5


@pytest.mark.parametrize("accumulate,parts", [(3, "a multiple of 3, for accumulate 3; got 8"), (0, "at least 1; got 0")])
def test_a_batch_divides_into_slices(accumulate, parts):
    with pytest.raises(ValueError, match=parts):
        TrainingOptions(batch_size=8, accumulate=accumulate)
    with pytest.raises(ValueError, match="a multiple of 12, for 6 processes and accumulate 2; got 8"):
        TrainingOptions(batch_size=8, accumulate=2).slice_size(6)


def plain_steps(model, data, options):
    """The former loop for one process, line by line: random numbers are drawn for the batch in this order."""
    trainer = make_trainer(data, model, **options)  # for its order of images, loss and schedule
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    model.train()
    for step in range(trainer.options.steps):
        index = trainer.indices(step)
        images = data.images[index].to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)
        torch.manual_seed(seed_of(step))
        mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
        labels = torch.where(torch.rand(len(images)) < 0.3, 3, data.labels[index])
        timesteps, noise = torch.randint(1000, (len(images),)), torch.randn_like(images)
        signal, sigma = (table[timesteps][:, None, None, None] for table in (trainer._loss.signal, trainer._loss.noise))
        prediction = model(signal * images + sigma * noise, timesteps, labels)
        optimizer.zero_grad(set_to_none=True)
        (trainer._loss.weight[timesteps] * (prediction - noise).square().mean(dim=(1, 2, 3))).mean().backward()
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        optimizer.step()
    return model.state_dict()


def seed_of(step):
    x = (step + 1) & 0xFFFFFFFFFFFFFFFF
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) >> 1


@pytest.mark.parametrize("count,batch_size", [(10, 4), (7, 7), (33, 16), (5, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_process_draws_what_it_always_has(count, batch_size, channels):
    data = make_data(count, labels=[i % 3 for i in range(count)], channels=channels)
    options = {"steps": 6, "batch_size": batch_size, "flip": True, "label_dropout": 0.3}
    fields = {"num_classes": 3, "dropout": 0.2, "in_channels": channels}
    trainer = make_trainer(data, make_model(0, **fields), **options)
    list(trainer.run())
    expected = plain_steps(make_model(0, **fields), data, options)
    assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in expected.items())
