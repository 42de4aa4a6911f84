import os
import random
import shutil

import pytest
import torch

from ddim_fast.training.checkpoints import kept, prune, recover, remove_run_remains, save_consistency, set_aside
from ddim_fast.training.options import TRAINING_STATE


def write(folder, step):
    """A checkpoint, as far as its files are concerned."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (("config.json", f"{step}".encode()), ("model.safetensors", bytes([step % 256]) * 99)):
        (folder / f"{name}.new").write_bytes(data)
        os.replace(folder / f"{name}.new", folder / name)
    torch.save({"step": step, "model": {"weight": torch.full((999,), step / 7)}}, folder / "state")
    os.replace(folder / "state", folder / TRAINING_STATE)


@pytest.fixture(params=[True, False], ids=["links", "copies"])
def run(request, tmp_path, monkeypatch):
    """A run with checkpoints of steps 1, 2 and 3, on a file system with or without further names of a file."""
    if not request.param:

        def link(*_):
            raise PermissionError(1, "no links here")

        monkeypatch.setattr(os, "link", link)
    for step in (1, 2, 3):
        write(tmp_path, step)
        if step < 3:
            set_aside(tmp_path, step)
    return tmp_path


def step_of(folder):
    return torch.load(folder / TRAINING_STATE)["step"], (folder / "config.json").read_text()


def test_checkpoints_are_kept_and_pruned(run):
    assert [(step, step_of(folder)) for step, folder in kept(run).items()] == [(2, (2, "2")), (1, (1, "1"))]
    assert step_of(run) == (3, "3")
    prune(run, 1)
    assert list(kept(run)) == [2]
    prune(run, 0)
    assert kept(run) == {} and step_of(run) == (3, "3")


def test_the_newest_whole_one_is_taken(run):
    assert recover(run) is None
    (run / TRAINING_STATE).write_bytes(b"")
    (kept(run)[2] / TRAINING_STATE).unlink()
    line = recover(run)
    assert line == (
        f"{run / TRAINING_STATE}: not a whole training state; {run / 'checkpoints/0000002' / TRAINING_STATE} is missing: "
        "going on from the checkpoint before, of step 1"
    )
    assert step_of(run) == (1, "1") and list(kept(run)) == [1] and recover(run) is None
    (run / TRAINING_STATE).write_bytes(b"")  # which spares the one that it was taken from
    assert recover(run).endswith("of step 1") and step_of(run) == (1, "1")
    for folder in (run, kept(run)[1]):
        (folder / TRAINING_STATE).write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"training_state\.pt: not a whole training state; .*there is no checkpoint before"):
        recover(run)


def test_a_recovery_that_is_killed_is_made_again(run, monkeypatch):
    (run / TRAINING_STATE).write_bytes(b"")
    replace, calls = os.replace, []

    def replace_or_die(*places):
        calls.append(places)
        if len(calls) == 3:
            raise KeyboardInterrupt
        replace(*places)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        with pytest.raises(KeyboardInterrupt):
            recover(run)
    assert recover(run).endswith("of step 2") and step_of(run) == (2, "2")


def test_a_flipped_bit_or_a_cut_anywhere_is_found_or_changes_nothing(run):
    """A torch file has bytes that nobody reads: its padding, and fields of its archive."""
    state, generator, found = run / TRAINING_STATE, random.Random(0), 0
    data = state.read_bytes()
    for number in range(400):
        place = generator.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ 1 << generator.randrange(8)]) + data[place + 1 :]
        state.write_bytes(flipped if number % 4 else data[:place])
        if recover(run) is None:
            loaded = torch.load(state)
            assert loaded["step"] == 3 and torch.equal(loaded["model"]["weight"], torch.full((999,), 3 / 7)), place
        else:
            found += 1
            assert step_of(run) == (2, "2")
    assert found > 300


def test_remains_are_removed_and_nothing_else(run):
    before = sorted(run.rglob("*"))
    (run / "samples").mkdir()
    for name in (".model.safetensors.abcd1234", "samples/.0000002.png.abcd_123", "checkpoints/.0000002.abcd1234"):
        (run / name).write_bytes(b"half")
    (run / "checkpoints" / ".0000003.abcd1234").mkdir()
    (run / "checkpoints" / ".0000003.abcd1234" / "config.json").write_bytes(b"half")
    (run / ".notes.txt.original").write_bytes(b"mine")
    remove_run_remains(run)
    assert sorted(run.rglob("*")) == sorted([*before, run / "samples", run / ".notes.txt.original"])


def test_a_checkpoint_that_was_set_aside_stays_as_it_was(run):
    folder = kept(run)[2]
    shutil.rmtree(kept(run)[1])
    set_aside(run, 2)  # of a run that is stopped before it writes the next one
    assert step_of(folder) == (2, "2") and sorted(p.name for p in folder.iterdir()) == sorted(
        ["config.json", "model.safetensors", TRAINING_STATE]
    )
    assert kept(run).keys() == {2}


@pytest.mark.parametrize("consistency", [None, False, True])  # the latter two from the version before
def test_no_timesteps_are_written_where_none_are_known(consistency, tmp_path):
    save_consistency(tmp_path, {"consistency": consistency})
    save_consistency(tmp_path, {})
    assert not list(tmp_path.iterdir())
