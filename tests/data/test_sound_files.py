import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch

from ddim_fast.data.sound_files import load_sounds
from ddim_fast.data.sounds import load_sound_images
from tests.helpers.tones import MEL, RATE, tone

LABELS = ["0/ann"] * 3 + ["0/bob"] * 3 + ["1/ann"] * 3 + ["1/bob"] * 3


def test_folders_are_labels(recordings):
    sounds = load_sounds(str(recordings), MEL)
    assert sounds.labels == LABELS and sounds.waves.shape == (12, 2048) and sounds.waves.dtype == np.float32
    assert load_sounds(str(recordings / "1"), MEL).labels == ["ann"] * 3 + ["bob"] * 3
    alone = load_sounds(str(recordings / "1" / "bob" / "2.wav"), MEL)
    assert alone.labels is None
    np.testing.assert_array_equal(alone.waves[0], sounds.waves[11])


@pytest.mark.parametrize("speaker", [True, False])
def test_parquet_in_the_hubs_layout(tmp_path, recordings, speaker):
    files = sorted(recordings.rglob("*.wav"))
    columns = {
        "audio": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "label": [int(file.parts[-3]) for file in files],
        **({"speaker": [file.parts[-2] for file in files]} if speaker else {}),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "sounds.parquet")
    sounds = load_sounds(str(tmp_path / "sounds.parquet"), MEL)
    assert sounds.labels == (LABELS if speaker else [label[0] for label in LABELS])
    np.testing.assert_array_equal(sounds.waves, load_sounds(str(recordings), MEL).waves)


def _named_classes(path, files, labels):
    """A Parquet file whose features name its labels and speakers, as the Hugging Face Hub's do."""
    columns = {
        "audio": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "label": labels,
        "speaker": [i % 2 for i in range(len(files))],
    }
    features = {name: {"names": names, "_type": "ClassLabel"} for name, names in CLASS_NAMES.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path)


CLASS_NAMES = {"label": ["zero", "one"], "speaker": ["ann", "bob"]}


def test_the_features_of_a_data_set_name_the_classes_of_sounds(tmp_path, recordings):
    files = sorted(recordings.rglob("*.wav"))[:3]
    _named_classes(tmp_path / "a.parquet", files, [1, 0, 1])
    assert load_sounds(str(tmp_path), MEL).labels == ["one/ann", "zero/bob", "one/ann"]
    _named_classes(tmp_path / "a.parquet", files, [1, 0, 2])
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: class 2 has no name; the file's features name 0 to 1$"):
        load_sounds(str(tmp_path), MEL)


def test_a_sound_stands_in_the_middle_at_the_configs_peak(tmp_path):
    short, long = tone(300, 100), np.r_[np.zeros(1000), tone(300, 2048), np.zeros(1000)]
    soundfile.write(tmp_path / "a.flac", short / 10, RATE)
    soundfile.write(tmp_path / "b.flac", long, RATE)
    a, b = load_sounds(str(tmp_path), MEL).waves
    assert abs(a).max() == abs(b).max() == MEL.peak
    assert (a[:974] == 0).all() and (a[1074:] == 0).all() and a[974:1074].any()
    np.testing.assert_allclose(b, long[1000:3048] * (0.5 / abs(long).max()), atol=1e-4)


def test_silence_stays_silent(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(500), RATE)
    assert not load_sounds(str(tmp_path), MEL).waves.any()


def test_other_rates_and_channels_are_refused_or_converted(tmp_path):
    soundfile.write(tmp_path / "fast.wav", tone(300, 4096, 2 * RATE), 2 * RATE)
    with pytest.raises(ValueError, match=r"fast\.wav has 8000 samples a second, the model's sounds have 4000"):
        load_sounds(str(tmp_path), MEL)
    resampled = load_sounds(str(tmp_path), MEL, convert=True).waves[0]
    np.testing.assert_allclose(resampled, tone(300), atol=2e-3)

    stereo = np.stack([tone(300), np.zeros(2048)], axis=1)
    soundfile.write(tmp_path / "fast.wav", stereo, RATE)
    with pytest.raises(ValueError, match=r"fast\.wav has 2 channels, the model's sounds have one"):
        load_sounds(str(tmp_path), MEL)
    np.testing.assert_allclose(load_sounds(str(tmp_path), MEL, convert=True).waves[0], tone(300), atol=1e-3)


def test_what_is_no_sound(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sounds at 'nowhere'"):
        load_sounds("nowhere", MEL)
    with pytest.raises(ValueError, match="no sounds in"):
        load_sounds(str(tmp_path), MEL)
    for name, data in (("a.wav", b"not a sound"), ("a.wav", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.wav: not a readable sound .*; copy or download it again, or save it as WAV$"):
            load_sounds(str(tmp_path), MEL)
    soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE)
    with pytest.raises(ValueError, match=r"a\.wav: the sound is empty; remove the file or record it again"):
        load_sounds(str(tmp_path), MEL)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.array([0.0, np.nan, 0.1]), RATE, format="WAV", subtype="FLOAT")
    (tmp_path / "a.wav").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"a\.wav: some samples are NaN, infinite or too large; convert the file again"):
        load_sounds(str(tmp_path), MEL)


def test_other_files_are_named_and_no_labels(tmp_path):
    for name in ("1/a.aiff", "2/b.au", "__MACOSX/1/._a.wav", "2/notes.txt", "2/c.m4a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(("aiff", "au")):
            soundfile.write(tmp_path / name, tone(300), RATE)
        else:
            (tmp_path / name).write_bytes(b"no sound")
    (tmp_path / "2/back").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match=r"skipped files that cannot be read as sounds: 1 \.(txt|m4a), 1 \.(txt|m4a)$"):
        assert load_sounds(str(tmp_path), MEL).labels == ["1", "2"]


def test_a_data_set_of_the_hub_in_a_folder(tmp_path, recordings):
    files = sorted(recordings.rglob("*.wav"))
    (tmp_path / "hub/data").mkdir(parents=True)
    for part, names in (("train", files[:4]), ("test", files[4:])):
        table = pyarrow.table({"audio": [{"bytes": file.read_bytes(), "path": None} for file in names]})
        pyarrow.parquet.write_table(table, tmp_path / f"hub/data/{part}-00000-of-00001.parquet")
    assert len(load_sounds(str(tmp_path / "hub"), MEL)) == 4


def test_a_header_that_says_too_much_is_named(tmp_path, capfd):
    soundfile.write(tmp_path / "a.flac", tone(300), RATE)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] |= 0x0F  # of 36 bits, the number of samples
    (tmp_path / "a.flac").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.flac: not a readable sound \(.*: a decompression bomb"):
        load_sounds(str(tmp_path), MEL)
    loud = np.full((2048, 2), 3e38, np.float32)
    soundfile.write(tmp_path / "a.flac", loud, RATE, "FLOAT", format="WAV")
    with pytest.raises(ValueError, match=r"a\.flac: some samples are NaN, infinite or too large; convert the file again"):
        load_sounds(str(tmp_path), MEL, convert=True)
    assert capfd.readouterr().err == ""


def test_training_data_are_numbered_by_name(recordings, config):
    data = load_sound_images(str(recordings), config, labelled=True)
    assert data.class_names == ("0/ann", "0/bob", "1/ann", "1/bob")
    assert data.labels.tolist() == [i for i in range(4) for _ in range(3)]
    assert tuple(data.images.shape) == (12, *config.image_shape)
    unlabelled = load_sound_images(str(recordings), config, labelled=False)
    assert unlabelled.labels is None and unlabelled.class_names is None
    # A model that has classes keeps their numbers.
    again = load_sound_images(str(recordings), config, labelled=True, class_names=("x", *data.class_names))
    assert torch.equal(again.labels, data.labels + 1)
    with pytest.raises(ValueError, match="class '0/ann' is not one of the model's: x, y"):
        load_sound_images(str(recordings), config, labelled=True, class_names=("x", "y"))
