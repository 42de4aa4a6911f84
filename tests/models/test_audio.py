import json

import pytest

from ddim_fast import UNet, UNetConfig
from ddim_fast.models.audio import AudioConfig

MEL = {"kind": "mel", "sample_rate": 8000, "length": 8192, "fold": 4}


@pytest.mark.parametrize("name", ["digits-mel", "digits-waveform"])
def test_presets_fit_their_networks(name):
    audio = AudioConfig.preset(name)
    assert audio.image_shape == UNetConfig.preset(name).image_shape
    assert AudioConfig.from_dict(json.loads(json.dumps(audio.to_dict()))) == audio
    assert audio.frames * audio.hop == audio.length and 2 * audio.margin + audio.hop == audio.n_fft
    assert AudioConfig.preset("grey-32") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "midi"}, "kind must be one of mel, waveform; got 'midi'"),
        ({"sample_rate": 0}, "sample_rate must be at least 1"),
        ({"length": 8000}, "length must be a multiple of hop, 128; got 8000"),
        ({"fold": 3}, "fold must be a divisor of 64 and 64; got 3"),
        ({"kind": "waveform", "fold": 3}, "fold must be a divisor of 8192; got 3"),
        ({"n_fft": 64}, "n_fft must be hop and an even number more"),
        ({"n_fft": 511}, "n_fft must be hop and an even number more"),
        ({"peak": 1.5}, "peak must be in"),
        ({"floor_db": 0.0}, "floor_db must be below ceiling_db"),
        ({"hops": 1}, "unknown configuration key 'hops'; did you mean 'hop'"),
    ],
)
def test_impossible_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        AudioConfig.from_dict({**MEL, **fields})


@pytest.fixture
def checkpoint(tmp_path):
    """The folder of an untrained network of sounds."""
    audio = AudioConfig(kind="waveform", sample_rate=8000, length=1024, fold=8)
    fields = {"base_channels": 8, "channel_multipliers": (1,), "layers_per_block": 1, "norm_num_groups": 4}
    model = UNet(UNetConfig(sample_size=(1, 128), in_channels=8, num_classes=2, class_names=("a", "b"), **fields))
    model.audio = audio
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_checkpoint_keeps_what_its_images_mean(checkpoint):
    model = UNet.from_pretrained(checkpoint)
    assert model.audio.image_shape == model.config.image_shape
    (checkpoint / "audio.json").unlink()
    assert UNet.from_pretrained(checkpoint).audio is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 2048}, r"its sounds are images of shape \(8, 1, 256\), the network's are \(8, 1, 128\)"),
        ({"kind": 3}, "kind must be a string"),
    ],
)
def test_a_description_of_another_network_is_refused(checkpoint, change, message):
    file = checkpoint / "audio.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"audio\.json: .*{message}"):
        UNet.from_pretrained(checkpoint)


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_audio_json_of_version_0_1_names_the_classes(checkpoint):
    change(checkpoint / "audio.json", labels=["x", "y"])
    assert UNet.from_pretrained(checkpoint).config.class_names == ("a", "b")
    change(checkpoint / "config.json", class_names=None)
    model = UNet.from_pretrained(checkpoint)
    assert model.config.class_names == ("x", "y")
    model.save_pretrained(checkpoint)
    assert "labels" not in json.loads((checkpoint / "audio.json").read_text())
    assert UNet.from_pretrained(checkpoint).config == model.config


@pytest.mark.parametrize("labels", [["a"], ["a", "a"], [1, 2], "ab"])
def test_names_that_do_not_fit_are_named(checkpoint, labels):
    change(checkpoint / "config.json", class_names=None)
    change(checkpoint / "audio.json", labels=labels)
    with pytest.raises(ValueError, match=r"audio\.json: class_names must be"):
        UNet.from_pretrained(checkpoint)


def test_former_names_of_the_names_of_classes():
    model = UNet.from_pretrained("spoken-digits")
    with pytest.warns(FutureWarning, match=r"is now model\.config\.class_numbers"):
        assert model.audio.class_numbers("7") == model.config.class_numbers("7") == list(range(42, 48))
    with pytest.warns(FutureWarning, match=r"is now model\.config\.class_names"):
        assert model.audio.labels == model.config.class_names
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match=r"is now model\.config\.class_numbers"):
        AudioConfig(**MEL).class_numbers("7")
