"""A run goes on with the data that it has seen, or says what has changed."""

import gzip
import io
import json
import shutil
import struct
import sys
import tarfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from ddim_fast import UNet, train
from ddim_fast.models import audio, config
from tests.helpers.small_runs import NETWORK, RUN, assert_one_line
from tests.helpers.tones import RATE, tone

RESUME = ("--resume", "--device=cpu", "--quiet")


def picture(path, shade=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), shade).save(path)


@pytest.fixture(autouse=True)
def quick_samples(monkeypatch):
    """Sampling is most of the time of so short a run."""
    monkeypatch.setattr("ddim_fast.cli.trainers.save_grid", lambda trainer, codec, averaged, path: picture(path))


@pytest.fixture
def run(run_here, here):
    """A function that trains ``here/run`` for so many steps in a working directory -> (exit code, stdout, stderr)."""
    return lambda *arguments, where=here: run_here(train, *arguments, "--out", here / "run", where=where)


@pytest.fixture
def photos(here):
    """A folder of two classes of four images each."""
    for i in range(8):
        picture(here / "photos" / f"class-{i % 2}" / f"{i}.png", 30 * i)
    return here / "photos"


def weights_in(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def start(run, data, *options):
    code, _, error = run("--data", data, *RUN, *options, "--steps=1")
    assert code == 0, error


def test_what_is_done_to_pictures_of_another_size_is_said(run, photos):
    for file in photos.glob("*/*.png"):
        Image.new("L", (12, 9)).save(file)
    code, _, err = run("--data", photos, "--steps=1", *(option for option in RUN if option != "--quiet"))
    assert code == 0 and "8 images were brought to 8x8: cropped to a square in the middle and resized\n" in err


def test_a_checkpoint_without_its_training_state_is_not_overwritten(run, photos, here):
    start(run, photos)
    (here / "run" / "training_state.pt").unlink()
    before = weights_in(here / "run")
    code, _, error = run(*RESUME, "--steps=2")
    assert code == 2
    assert_one_line(error, "--resume", "has a checkpoint, but no training_state.pt", f"--init {here / 'run'}")
    assert weights_in(here / "run") == before


def test_a_checkpoint_without_a_run_is_not_overwritten(run, photos, here):
    start(run, photos)
    (here / "run" / "train.json").unlink()
    before = weights_in(here / "run")
    code, _, error = run("--data", photos, *RUN, "--steps=1")
    assert code == 2
    assert_one_line(error, f"--out {here / 'run'} holds a checkpoint already")
    assert weights_in(here / "run") == before


@pytest.mark.parametrize("spec", ["photos", "./photos/", "photos/../photos"])
def test_a_run_goes_on_with_its_data_from_another_working_directory(spec, run, photos, here, tmp_path):
    start(run, spec)
    shutil.copytree(here / "run", here / "again")
    assert run(*RESUME, "--steps=2")[0] == 0
    elsewhere = tmp_path / "elsewhere"
    for i in range(8):
        picture(elsewhere / "photos" / f"class-{i % 2}" / f"{i}.png", 255 - 30 * i)
    (here / "run").rename(tmp_path / "run")
    (here / "again").rename(here / "run")
    code, _, error = run(*RESUME, "--steps=2", where=elsewhere)
    assert code == 0, error
    assert weights_in(here / "run") == weights_in(tmp_path / "run")


def test_data_that_is_gone_is_not_looked_for_on_the_hub(run, photos, here):
    (here / "data").mkdir()
    photos.rename(here / "data" / "photos")
    start(run, "data/photos")
    shutil.rmtree(here / "data")
    code, _, error = run(*RESUME, "--steps=2")
    assert code == 1
    assert_one_line(error, f"no images at '{here}/data/photos'", f"those of {here}/run/train.json")


def test_a_run_goes_on_where_its_data_was_moved(run, photos, here):
    start(run, photos, "--class-conditional")
    shutil.copytree(here / "run", here / "again")
    assert run(*RESUME, "--steps=2")[0] == 0
    before = weights_in(here / "run")
    shutil.rmtree(here / "run")
    (here / "again").rename(here / "run")
    photos.rename(here / "moved")
    assert run(*RESUME, "--data", "moved", "--steps=2") == (0, "trained to step 2; sample with: python -m ddim_fast.sample "
        f"--model {here / 'run'}\n", "")  # fmt: skip
    assert weights_in(here / "run") == before


@pytest.mark.parametrize(
    "change,parts",
    [
        (lambda photos: (photos / "class-0").rename(photos / "zebra"), ["class 0 of the run is 'class-0'", "it is 'class-1'"]),
        (lambda photos: (photos / "class-1").rename(photos / "a"), ["class 0 of the run is 'class-0'", "it is 'a'"]),
        (lambda photos: picture(photos / "class-2" / "8.png"), ["the run has 2 classes", "has 3"]),
        (lambda photos: shutil.rmtree(photos / "class-1"), ["the run has 2 classes", "has 1"]),
        (lambda photos: (photos / "class-1" / "3.png").unlink(), ["1 of the 8 files", "are gone", "'class-1/3.png'"]),
        (lambda photos: picture(photos / "class-0" / "2.png", 61), []),
        (
            lambda photos: Image.linear_gradient("L").resize((8, 8)).save(photos / "class-0" / "2.png"),
            ["1 of the 8 files", "or have changed", "'class-0/2.png'"],
        ),
        (
            lambda photos: (photos / "class-1" / "3.png").rename(photos / "class-0" / "3.png"),
            ["1 of the 8 files", "'class-1/3.png'"],
        ),
    ],
)
def test_classes_and_images_that_are_gone_stop_it(change, parts, run, photos, here):
    start(run, photos, "--class-conditional")
    change(photos)
    before = {path.name: path.read_bytes() for path in (here / "run").iterdir() if path.is_file()}
    code, _, error = run(*RESUME, "--steps=2")
    if not parts:  # a picture of the same name and size passes for the same
        assert (code, error) == (0, "")
        return
    assert code == 2
    assert_one_line(error, "--resume", *parts, f"remove {here / 'run' / 'data.json'}")
    assert {path.name: path.read_bytes() for path in (here / "run").iterdir() if path.is_file()} == before
    (here / "run" / "data.json").unlink()  # as it says
    code, _, error = run(*RESUME, "--steps=2")
    assert code == (2 if "classes" in error else 0)


def test_more_images_are_told_and_remembered(run, photos, here):
    start(run, photos, "--class-conditional")
    picture(photos / "class-1" / "9.png")
    code, _, error = run(*RESUME, "--steps=2")
    assert code == 0
    assert_one_line(error, f"{photos} holds 9 images, 1 more than before")
    assert run(*RESUME, "--steps=3")[::2] == (0, "")
    record = json.loads((here / "run" / "data.json").read_text())
    assert (record["path"], record["images"]) == (str(photos), 9)
    assert record["classes"] == {"class-0": 4, "class-1": 5}
    assert record["files"]["class-1/9.png"] == (photos / "class-1" / "9.png").stat().st_size


def test_classes_that_nothing_uses_may_be_called_anything(run, photos, here):
    start(run, photos)
    assert json.loads((here / "run" / "data.json").read_text())["classes"] is None
    (photos / "class-0").rename(photos / "zebra")
    code, _, error = run(*RESUME, "--steps=2")  # the files are no more where they were, though
    assert code == 2
    assert_one_line(error, "4 of the 8 files of the run are gone")


def test_a_run_of_before_there_was_a_record_goes_on(run, photos, here):
    start(run, photos)
    (here / "run" / "data.json").unlink()
    picture(photos / "class-1" / "9.png")
    assert run(*RESUME, "--steps=2")[::2] == (0, "")
    assert json.loads((here / "run" / "data.json").read_text())["images"] == 9


def test_a_run_without_a_checkpoint_starts_over_with_what_there_is(run, photos, here):
    assert run("--data", photos, *RUN, "--steps=6", "--lr=1e30")[0] == 1
    (photos / "class-1" / "3.png").unlink()
    assert run(*RESUME, "--steps=1", "--lr=1e-3")[::2] == (0, "")


@pytest.mark.parametrize("out", ["photos/run", "photos/class-0/run", "photos"])
def test_its_own_samples_are_not_its_data(out, run_here, photos, here):
    options = ("--out", here / out, "--device=cpu", "--quiet")
    command = ("--data", photos, *RUN, "--steps=1", "--sample-every=1")
    assert run_here(train, *command, *options)[0] == 0
    assert (here / out / "samples" / "0000001.png").is_file()
    code, _, error = run_here(train, *options, "--resume", "--steps=2")
    assert (code, error) == (0, "")
    assert json.loads((here / out / "data.json").read_text())["images"] == 8
    assert run_here(train, *command[:-1], "--out", here / "second")[0] == 0  # nor those of another run
    assert json.loads((here / "second" / "data.json").read_text())["images"] == 8


def encoded():
    file = io.BytesIO()
    Image.new("L", (8, 8), 100).save(file, "png")
    return file.getvalue()


def write_parquet(path, labels):
    pq.write_table(pa.table({"image": [{"bytes": encoded()}] * len(labels), "label": labels}), path)


def write_idx(folder, labels):
    folder.mkdir(exist_ok=True)
    count = len(labels)
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, count, 8, 8) + bytes(64 * count))
    labels = struct.pack(">HBBI", 0, 8, 1, count) + bytes(labels)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)


@pytest.mark.parametrize(
    "write,before,after,message",
    [
        (write_parquet, [0, 1, 1], [0, 1], "the run has seen 2 images of class '1'"),
        (write_idx, [0, 1, 1], [0, 1, 0], "the run has seen 2 images of class '1'"),
        (write_idx, [0, 1, 1], [0, 1], "1 of the 1 files"),
    ],
)
def test_data_sets_of_one_file(write, before, after, message, run, here):
    write(here / "set.parquet", before)
    start(run, "set.parquet", "--class-conditional")
    assert run(*RESUME, "--steps=2")[::2] == (0, "")
    write(here / "set.parquet", after)
    code, _, error = run(*RESUME, "--steps=3")
    assert code == 2
    assert_one_line(error, message, str(here / "set.parquet"))


def test_a_record_without_the_names_that_the_data_has(run, here):
    """Version 0.1 did not look for them in a Parquet file."""
    table = pa.table({"image": [{"bytes": encoded()}] * 3, "label": [0, 1, 1]})
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), here / "set.parquet")
    start(run, "set.parquet", "--class-conditional")
    record = here / "run" / "data.json"
    assert json.loads(record.read_text())["classes"] == {"cat": 1, "dog": 2}
    assert UNet.from_pretrained(here / "run").config.class_names == ("cat", "dog")
    record.write_text(record.read_text().replace('"cat"', '"0"').replace('"dog"', '"1"'))
    assert run(*RESUME, "--steps=2")[::2] == (0, "")
    record.write_text(record.read_text().replace('"cat"', '"bird"'))
    code, _, error = run(*RESUME, "--steps=3")
    assert code == 2
    assert_one_line(error, "class 0 of the run is 'bird'", "it is 'cat'")


def test_hub_data_is_counted_and_no_folder_of_its_name(run, here, monkeypatch):
    class Rows(list):
        column_names = ("image", "label")
        features = dict.fromkeys(column_names)
        cache_files = ()

        def cast_column(self, name, kind):
            return [{**row, name: {"bytes": encoded(), "path": None}} for row in self]

    def upload(*labels):
        rows = Rows({"image": Image.new("L", (8, 8)), "label": label} for label in labels)
        library = SimpleNamespace(load_dataset=lambda name, split: rows, Image=lambda decode: None)
        monkeypatch.setitem(sys.modules, "datasets", library)

    upload(0, 1, 1)
    start(run, "owner/name", "--class-conditional")
    assert run(*RESUME, "--steps=2")[::2] == (0, "")
    upload(0, 1, 0)
    code, _, error = run(*RESUME, "--steps=3")
    assert code == 2
    assert_one_line(error, "the run has seen 2 images of class '1', owner/name has 1")
    for i in range(3):
        picture(here / "owner" / "name" / f"{i % 2}" / f"{i}.png")
    code, _, error = run(*RESUME, "--steps=3")
    assert code == 2
    assert_one_line(error, f"the run was trained on 'owner/name', not on '{here}/owner/name'")


def test_classes_of_sounds_are_remembered_by_name(run, recordings, monkeypatch):
    sound = {"kind": "mel", "sample_rate": RATE, "length": 2048, "n_fft": 256, "hop": 128, "mels": 16, "fold": 2}
    monkeypatch.setitem(audio._PRESETS, "digits-mel", sound)
    small = {"base_channels": 16, "channel_multipliers": (1, 2), "layers_per_block": 1, "attention_resolutions": (4,)}
    monkeypatch.setitem(config._PRESETS, "digits-mel", {"sample_size": 8, "in_channels": 4, **small, "norm_num_groups": 4})
    options = ("--preset=digits-mel", "--class-conditional", "--batch-size=4", "--device=cpu", "--dtype=float32", "--quiet")
    assert run("--data", recordings, *options, "--steps=1")[0] == 0
    soundfile.write(recordings / "0" / "ann" / "4.wav", tone(300), RATE)
    assert run(*RESUME, "--steps=2")[0] == 0
    (recordings / "0").rename(recordings / "2")
    code, _, error = run(*RESUME, "--steps=3")
    assert code == 2
    assert_one_line(error, "class 0 of the run is '0/ann'", "it is '1/ann'")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"path": 1, "images": 8, "classes": null, "files": {}}'])
def test_a_damaged_record_of_data_is_named(text, run, photos, here):
    start(run, photos)
    (here / "run" / "data.json").write_text(text)
    code, _, error = run(*RESUME, "--steps=2")
    assert code == 1
    assert_one_line(error, "data.json: ")


def test_what_a_record_quotes_is_one_line(run, photos, here):
    start(run, photos)
    file = here / "run" / "data.json"
    for change in ({"path": "a\nb"}, {"files": {"c\nd": 1}}):
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        code, _, error = run(*RESUME, "--steps=2")
        assert code == 2
        assert_one_line(error, str(file))


@pytest.mark.parametrize(
    "change,parts",
    [
        ({"steps": "many"}, ["--steps", "'many'"]),
        ({"log_every": 0}, ["--log-every", "'0'"]),
        ({"lr": -1.0}, ["lr must be positive"]),
        ({"set": ["sample_size"]}, ["--set takes KEY=VALUE"]),
        ({"set": [5]}, ["not the record of a run"]),
        ({"compile": "yes"}, ["--compile"]),
        ({"help": True}, ["there is no option 'help'"]),
        ({"preset": "cifar"}, ["--preset", "'cifar'"]),
    ],
    ids=str,
)
def test_damage_in_the_record_of_a_run_is_named(change, parts, run, photos, here):
    start(run, photos)
    file = here / "run" / "train.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    code, _, error = run(*RESUME)
    assert code != 0
    assert_one_line(error, str(file), *parts)


def test_lines_of_losses_that_are_none_are_dropped(run, photos, here):
    start(run, photos)
    stats = here / "run" / "stats.jsonl"
    good = stats.read_bytes()
    stats.write_bytes(good + b'[1]\n7\n{"step": "x"}\n{}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": 1}\n')
    (here / "run" / "ema").mkdir()
    (here / "run" / "ema" / "1 of 2.safetensors").write_bytes(b"somebody's")
    assert run(*RESUME, "--steps=1")[0] == 0
    assert stats.read_bytes() == good + b'{"step": 1}\n'
    assert (here / "run" / "ema" / "1 of 2.safetensors").is_file()


def test_a_start_is_found_from_another_working_directory(run, run_here, photos, here, tmp_path):
    assert run_here(train, "--data", photos, *RUN, "--steps=1", "--out", here / "first")[0] == 0
    options = RUN[len(NETWORK) :]
    assert run("--init", "first", "--data", "photos", *options, "--lr=1e30", "--steps=9")[0] == 1  # before any checkpoint
    record = json.loads((here / "run" / "train.json").read_text())
    assert (record["init"], record["data"]) == (str(here / "first"), str(photos))
    code, _, error = run("--resume", "--lr=1e-9", "--steps=1", "--device=cpu", "--quiet", where=tmp_path / "elsewhere")
    assert code == 0, error
    assert UNet.from_pretrained(here / "run").config == UNet.from_pretrained(here / "first").config


def test_records_that_cannot_be_read_end_a_run_or_are_left_out_and_listed(run, photos, here):
    (photos / "class-0" / "2.png").write_bytes(b"no image")
    (photos / "class-1" / "5.png").write_bytes(b"no image either")
    for options, parts in (
        ((), [f"{photos}/class-0/2.png: not a readable image"]),
        (("--max-bad=1",), [f"{photos}/class-1/5.png: not a readable image", "; 2 records cannot be read, and --max-bad is 1"]),
    ):
        code, _, error = run("--data", photos, *RUN, "--steps=1", *options)
        assert code == 1
        assert_one_line(error, *parts)
    options = [option for option in RUN if option != "--quiet"]
    code, _, error = run("--data", photos, "--val", photos, *options, "--steps=1", "--max-bad=2")
    line = f"{photos}: 2 records that cannot be read left out: {photos}/class-0/2.png; {photos}/class-1/5.png\n"
    assert code == 0 and error.count(line) == 2  # of --data and of --val
    record = json.loads((here / "run" / "data.json").read_text())
    assert [place for place, _ in record["left_out"]] == [f"{photos}/class-0/2.png", f"{photos}/class-1/5.png"]
    assert record["images"] == 6
    assert run(*RESUME, "--steps=2")[::2] == (0, "")  # it remembers --max-bad
    code, _, error = run(*RESUME, "--max-bad=-1", "--steps=3")
    assert code == 2
    assert_one_line(error, "--max-bad: '-1' is not a whole number of at least 0")


def test_a_recording_that_cannot_be_read_is_left_out(run, recordings, here):
    (recordings / "0" / "ann" / "0.wav").write_bytes(b"no sound")
    options = [
        "--preset=digits-mel",
        *RUN[len(NETWORK) :],
        "--set",
        "base_channels=8",
        "norm_num_groups=4",
        "layers_per_block=1",
    ]
    code, _, error = run("--data", recordings, *options, "--steps=1")
    assert code == 1
    assert_one_line(error, "0/ann/0.wav: not a readable sound")
    code, _, error = run("--data", recordings, *options, "--steps=1", "--max-bad=20")
    assert code == 1  # of another rate, which is no damage
    assert_one_line(error, "0/ann/1.wav has 4000 samples a second", "--convert")
    code, _, error = run("--data", recordings, *options, "--steps=1", "--max-bad=1", "--convert")
    assert code == 0, error
    record = json.loads((here / "run" / "data.json").read_text())
    assert record["images"] == 11 and record["left_out"][0][0].endswith("0/ann/0.wav")


def test_a_run_on_shards_larger_than_memory_equals_one_in_memory(run, photos, here, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    for shard in range(2):
        with tarfile.open(here / f"photos-{shard:03d}.tar", "w") as archive:
            for file in sorted((photos / f"class-{shard}").iterdir()):
                archive.add(file, file.name)
                (here / "label").write_text(f"class-{shard}")
                archive.add(here / "label", f"{file.stem}.cls")
    start(run, "photos-{000..001}.tar", "--class-conditional")
    assert not (here / "cache").exists()
    (here / "run").rename(here / "from-memory")
    monkeypatch.setattr("ddim_fast.data.images.available_memory", lambda: 0)
    options = ("--data", "photos-{000..001}.tar", *RUN, "--class-conditional", "--steps=1")
    code, _, error = run(*options)
    assert code == 0
    assert_one_line(error, f"{here}/photos-{{000..001}}.tar is decoded once, into {here}/cache/ddim_fast/decoded/")
    assert weights_in(here / "run") == weights_in(here / "from-memory")
    config = json.loads((here / "run" / "config.json").read_text())
    assert config["class_names"] == ["class-0", "class-1"]
    assert run(*RESUME, "--steps=2", where=here.parent)[::2] == (0, "")
    with open(here / "photos-001.tar", "ab") as file:
        file.write(bytes(512))
    code, _, error = run(*RESUME, "--steps=3")
    assert code == 1
    assert_one_line(error, "has changed since it was decoded into", "photos-001.tar', of 1 files; remove that folder")
