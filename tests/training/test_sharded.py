"""A network, its optimizer's state and its averages, split among processes."""

import math

import pytest
import torch

from ddim_fast.training.loop import TrainingOptions
from tests.helpers.ranks import trained
from tests.training.test_distributed import NOT_FINITE, PLAIN, relative_error
from tests.training.test_loop import assert_equal_states, make_data, make_trainer

SHARD = "options = dict(shard=processes.count > 1, "
SHARDED = PLAIN.replace("options = dict(", SHARD).replace("make_model(processes.rank", "make_model(0")

# Each layout goes on for four steps from the checkpoint of the one before; several processes split it.
RESUMED = """
def make(processes, accumulate):
    done = torch.load(run / "training_state.pt")["step"] if run.exists() else 0
    options = dict(batch_size=12, accumulate=accumulate, steps=done + 4, ema=0.9, ema_snapshots=1)
    trainer = make_trainer(make_data(10), processes=processes, shard=processes.count > 1, **options)
    if done:
        trainer.load(run)
    return trainer
"""


@pytest.fixture
def runs(tmp_path):
    """A function: the results of :func:`trained`, by layout and rank."""

    def run(make, layouts):
        trained(make, layouts, tmp_path)
        return {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}

    return run


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [[(2, 3)], [(4, 1)]], ids=str)
def test_the_weights_are_those_of_one_process(layouts, runs):
    found = runs(SHARDED, [(1, 1), *layouts])
    one = found["1x1-0"]
    assert max(norm for _, norm in one["steps"]) > 1  # gradients are clipped
    for count, accumulate in layouts:
        first, *others = [found[f"{count}x{accumulate}-{rank}"] for rank in range(count)]
        assert relative_error(first["model"], one["model"]) < 1e-5
        assert relative_error(first["ema"], one["ema"]) < 1e-5
        torch.testing.assert_close(torch.tensor(first["steps"]), torch.tensor(one["steps"]), rtol=1e-4, atol=0)
        assert first["validation"] == pytest.approx(one["validation"], rel=1e-5)
        for other in others:
            assert other["steps"] == first["steps"] and other["validation"] == first["validation"]
            assert_equal_states(other["model"], first["model"])
        held = torch.tensor([state["held"] for state in (first, *others)])
        assert held.sum(0).tolist() == one["held"]  # nothing twice
        assert (held < 1.2 * torch.tensor(one["held"]) / count).all()


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_process_is_passed_over_by_all(runs):
    first, second = runs(NOT_FINITE.replace("steps=4", "steps=4, shard=True"), [(2, 1)]).values()
    assert [math.isfinite(sum(step)) for step in first["steps"]][:2] == [True, False]
    assert str(first["steps"]) == str(second["steps"])  # nan is not nan
    assert all(tensor.isfinite().all() for tensor in first["model"].values())
    assert_equal_states(first["model"], second["model"])


@pytest.mark.slow
def test_a_run_goes_on_with_shards_and_without(tmp_path):
    for name, make, layouts in (
        ("changing", RESUMED, [(1, 3), (2, 1), (1, 1)]),
        ("whole", RESUMED.replace("done + 4", "12"), [(1, 1)]),
    ):
        (tmp_path / name).mkdir()
        trained(make, layouts, tmp_path / name)
    changing, whole = (torch.load(tmp_path / name / "run" / "training_state.pt") for name in ("changing", "whole"))
    assert changing["step"] == whole["step"] == 12
    for name in ("model", "ema", "averages"):
        assert relative_error(changing[name], whole[name]) < 1e-5
    for kind in ("exp_avg", "exp_avg_sq"):  # together: some gradients are zero but for rounding
        found, expected = ({kind: moments_of(state, kind)} for state in (changing, whole))
        assert relative_error(found, expected) < 1e-5


def moments_of(state, kind):
    return torch.cat([moments[kind].flatten() for moments in state["optimizer"]["state"].values()])


@pytest.mark.parametrize("options", [{"optimizer": "muon"}, {"compile": True}], ids=str)
def test_what_needs_whole_weights_is_refused(options):
    with pytest.raises(ValueError, match=r"^shard .*leave"):
        TrainingOptions(shard=True, **options)


def test_one_process_has_nothing_to_split():
    with pytest.raises(ValueError, match="start them by torchrun"):
        make_trainer(make_data(4), shard=True)
