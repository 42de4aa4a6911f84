"""The commands on sounds: train, sample, interpolate, restyle, restore_sounds."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from PIL import Image

from ddim_fast import UNet, edit, export, interpolate, reconstruct, restore, restore_sounds, restyle, sample, train
from ddim_fast.models import audio, config
from tests.helpers.tones import RATE, tone

NETWORKS = {
    "mel": {"sample_size": (8, 8), "in_channels": 4},
    "waveform": {"sample_size": (1, 256), "in_channels": 8},
}
MADE = {}
SMALL = {"base_channels": 16, "channel_multipliers": (1, 2), "layers_per_block": 1, "attention_resolutions": (4,)}


@pytest.fixture(autouse=True, params=NETWORKS)
def presets(request, monkeypatch):
    """Small ones of each kind, by the names of the real ones."""
    kind = request.param
    sounds = {"mel": {"fold": 2}, "waveform": {"fold": 8}}[kind]
    sound = {"kind": kind, "sample_rate": RATE, "length": 2048, "n_fft": 256, "hop": 128, "mels": 16, **sounds}
    monkeypatch.setitem(audio._PRESETS, "digits-mel", sound)
    monkeypatch.setitem(config._PRESETS, "digits-mel", {**NETWORKS[kind], **SMALL, "norm_num_groups": 4})
    return kind


@pytest.fixture
def trained(run_here, presets, recordings, here, tmp_path_factory):
    """The checkpoint of two steps of training, which is made once for each kind of sound."""
    if presets not in MADE:
        data = ["--data", recordings, "--preset=digits-mel", "--class-conditional", "--recipe=fast"]
        MADE[presets] = tmp_path_factory.mktemp("trained") / "run"
        run = ["--steps=2", "--batch-size=4", "--device=cpu", "--dtype=float32", "--out", MADE[presets], "--quiet"]
        code, _, error = run_here(train, *data, *run)
        assert code == 0, error
    shutil.copytree(MADE[presets], here / "run")
    return here / "run"


def sounds_in(folder) -> dict[str, np.ndarray]:
    """By name, the sounds of a folder, each of the model's rate and length, finite and in [-1, 1]."""
    sounds = {}
    for path in sorted(folder.glob("*.wav")):
        sounds[path.stem], rate = soundfile.read(path)
        assert rate == RATE and sounds[path.stem].shape == (2048,)
        assert np.isfinite(sounds[path.stem]).all() and abs(sounds[path.stem]).max() <= 1
    return sounds


def test_a_run_describes_its_sounds(trained):
    model = UNet.from_pretrained(trained)
    assert model.config.class_names == ("0/ann", "0/bob", "1/ann", "1/bob") and model.config.num_classes == 4
    assert json.loads((trained / "train.json").read_text())["flip"] is False
    with Image.open(trained / "samples" / "0000002.png") as grid:
        assert grid.mode == "L"


def test_sample_writes_sounds(run_here, trained, here):
    request = ["--model", trained, "--class=1", "--seeds=0-2", "--steps=2"]
    code, text, error = run_here(sample, *request, "--out=out", "--trajectory=film.gif")
    assert code == 0 and "3 sounds of 2 steps" in text and "3/3 sounds" in error
    first = sounds_in(here / "out")
    assert sorted(first) == ["000000", "000001", "000002"]
    assert not np.array_equal(first["000000"], first["000001"])
    assert {p.name for p in (here / "out").iterdir() if p.suffix != ".wav"} == {"record.json", "spectrograms.png"}
    with Image.open(here / "film.gif") as film:
        assert film.size == (4 * (3 * 18 + 2), 4 * (18 + 2))  # three spectrograms of 16 x 16, with white between them

    (here / "out" / "000001.wav").write_bytes(b"")  # a run that was killed goes on
    assert run_here(sample, *request, "--out=out")[0] == 0
    np.testing.assert_array_equal(sounds_in(here / "out")["000001"], first["000001"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class=an"], "--class: no class is called 'an'; did you mean 'ann'? There are 0/ann, 0/bob, 1/ann, 1/bob"),
        (["--class=4"], "--class: class 4 is out of range: the network has classes 0..3"),
        (["--out=a.npz"], "name a folder for the model's sounds"),
    ],
)
def test_sample_refuses(run_here, trained, here, options, message):
    before = {*here.iterdir()}
    code, _, error = run_here(sample, "--model", trained, "--steps=2", *options)
    assert code == 2 and message in error and error.count("\n") == 1
    assert {*here.iterdir()} == before


def test_between_sounds(run_here, trained, recordings, here):
    ends = [recordings / "1" / "ann" / "0.wav", "seed:3"]
    options = ["--model", trained, "--class=1/ann", "--frames=3", "--steps=3", "--out=between"]
    code, out, error = run_here(interpolate, *ends, *options)
    assert code == 0, error
    assert out.startswith("3 sounds") and sorted(sounds_in(here / "between")) == ["0", "1", "2"]
    assert {p.name for p in (here / "between").iterdir() if p.suffix != ".wav"} == {
        "grid.png",
        "film.gif",
        "record.json",
    }
    code, _, error = run_here(interpolate, *ends, "--model", trained, "--class=1")
    assert code == 2 and "'1' means 2 classes; name one of 1/ann, 1/bob" in error


def test_restyle(run_here, trained, recordings, here):
    code, out, error = run_here(restyle, recordings, "--model", trained, "--to=1/bob", "--steps=3", "--out=restyled")
    assert code == 0, error
    assert out.startswith("12 sounds restyled") and len(sounds_in(here / "restyled")) == 12
    record = json.loads((here / "restyled" / "record.json").read_text())
    assert len(record["loudness_errors"]) == 12 and record["settings"]["target"] == "1/bob"
    assert (here / "restyled" / "comparison.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a.wav", "--to=1/bob"], "give one by --from"),
        (["a.wav", "--from=0/ann", "--to=1"], "'1' means 2 classes"),
        (["a.wav", "--from=0/ann", "--to=1/bob", "--loudness-std=0"], "must be positive"),
        (["a.wav", "--from=0/ann", "--to=1/bob", "--control=."], "--control is one recording; '.' holds 2"),
        (["stereo/b.wav", "--from=0/ann", "--to=1/bob"], "has 2 channels"),
        (["nothing", "--to=1/bob"], "no sounds at 'nothing'"),
        (["a.wav", "--from=0/ann", "--to=1/bob", "--model=fashion-mnist"], "makes images, not sounds"),
    ],
)
def test_restyle_refuses(run_here, trained, here, options, message):
    (here / "stereo").mkdir()
    soundfile.write(here / "a.wav", tone(300), RATE)
    soundfile.write(here / "stereo" / "b.wav", np.stack([tone(300)] * 2, axis=1), RATE)
    if "--control=." in options:
        soundfile.write(here / "stereo" / "b.wav", tone(300), RATE)
    before = {*here.iterdir()}
    code, _, error = run_here(restyle, "--model", trained, "--steps=2", *options)
    assert code == 2 and message in error and error.count("\n") == 1, error
    assert {*here.iterdir()} == before


def test_restore_a_gap(run_here, trained, recordings, here):
    file = recordings / "0" / "ann" / "1.wav"
    options = ["--model", trained, "--class=0/ann", "--gap", "0.2", "0.25", "--steps=3", "--out=restored"]
    code, out, error = run_here(restore_sounds, file, *options)
    assert code == 0, error
    assert out.startswith("1 sound restored") and list(sounds_in(here / "restored")) == ["1"]


def test_a_model_without_classes_asks_for_none(run_here, recordings, here):
    run = ["--steps=1", "--batch-size=4", "--warmup=0", "--device=cpu", "--dtype=float32", "--quiet", "--out", here / "run"]
    assert run_here(train, "--data", recordings, "--preset=digits-mel", *run)[0] == 0
    options = ["--model", here / "run", "--gap", "0.1", "0.15", "--steps=2", "--out=restored", "--quiet"]
    assert run_here(restore_sounds, recordings, *options) == (0, "", "")
    code, _, error = run_here(restyle, recordings, "--model", here / "run", "--to=0")
    assert code == 2 and "--to: the network is unconditional: it has no classes" in error


def test_restore_a_band(run_here, trained, recordings, here, presets):
    options = ["--model", trained, "--cutoff=1000", "--steps=3", "--out=restored", "--quiet"]
    code, _, error = run_here(restore_sounds, recordings, *options)
    if presets == "waveform":
        assert code == 2 and "needs a model of spectrograms" in error and not (here / "restored").exists()
    else:
        assert (code, error) == (0, "") and len(sounds_in(here / "restored")) == 12


@pytest.mark.parametrize(
    ("command", "arguments", "instead"),
    [
        (reconstruct, (), "see python -m ddim_fast.restyle"),
        (edit, ("--strength", "0.5"), "see python -m ddim_fast.restyle"),
        (restore, ("--task", "deblur", "--sigma", "1"), "see python -m ddim_fast.restore_sounds"),
    ],
    ids=["reconstruct", "edit", "restore"],
)
def test_commands_for_images_say_so(command, arguments, instead, run_here, trained, recordings):
    code, _, error = run_here(command, recordings, *arguments, "--model", trained)
    assert code == 2 and f"is a model of sounds, not of pictures: {instead}" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: soundfile.write(path, tone(300), 2 * RATE), "has 8000 samples a second, the model's sounds have 4000"),
        (lambda path: soundfile.write(path, np.zeros((100, 2)), RATE), "has 2 channels, the model's sounds have one"),
        (lambda path: path.write_bytes(b"no sound"), "not a readable sound"),
        (lambda path: None, "no sounds in"),
    ],
)
def test_train_refuses_what_it_cannot_read(run_here, here, write, message):
    (here / "data").mkdir()
    write(here / "data" / "a.wav")
    code, _, error = run_here(train, "--data=data", "--preset=digits-mel", "--out=run")
    assert code == 1 and message in error and error.count("\n") == 1
    assert not (here / "run").exists()


def test_there_is_no_onnx_of_sounds(run_here, trained, here):
    for label in ([], ["--class=1/ann"]):
        code, _, error = run_here(export, "--to=onnx", "--model", trained, "--out=exported", *label)
        assert code == 2 and "makes sounds" in error and error.count("\n") == 1
        assert not (here / "exported").exists()
