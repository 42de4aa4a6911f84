import dataclasses
import json

import pytest

from ddim_fast import UNetConfig
from ddim_fast.models.config import preset_names

NAN, INF = float("nan"), float("inf")


def test_presets_are_the_published_architectures():
    assert preset_names()[:5] == ("cifar10-64", "cifar10-128", "celeba-64", "celebahq-256", "grey-32")
    assert UNetConfig.preset("cifar10-64").level_channels == (64, 128, 128, 128)
    assert UNetConfig.preset("cifar10-128").level_channels == (128, 256, 256, 256)
    assert UNetConfig.preset("celeba-64").level_channels == (128, 256, 256, 256, 512)
    assert UNetConfig.preset("celebahq-256").level_channels == (128, 128, 256, 256, 512, 512)
    assert UNetConfig.preset("celebahq-256").image_shape == (3, 256, 256)
    assert UNetConfig.preset("grey-32").image_shape == (1, 32, 32)


def test_the_defaults_are_those_of_the_ddpm_weights():
    config = UNetConfig.preset("cifar10-128")
    assert (config.norm_num_groups, config.norm_eps, config.dropout) == (32, 1e-6, 0.1)
    assert (config.flip_sin_to_cos, config.freq_shift, config.downsample_padding) == (False, 1.0, 0)
    assert (config.attention_resolutions, config.attention_head_dim) == ((16,), None)
    assert (config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps) == (
        "linear",
        1e-4,
        0.02,
        1000,
    )


@pytest.mark.parametrize("name", preset_names())
def test_overrides_change_only_what_they_name(name):
    preset = UNetConfig.preset(name)
    changed = UNetConfig.preset(name, layers_per_block=3, prediction_type="v_prediction")
    assert changed == dataclasses.replace(preset, layers_per_block=3, prediction_type="v_prediction") != preset
    assert UNetConfig.preset(name) == preset


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match=r"unknown preset 'cifar'; there are cifar10-64, .*grey-32"):
        UNetConfig.preset("cifar")


def test_an_unknown_key_is_an_error_with_a_hint():
    with pytest.raises(ValueError, match="unknown configuration key 'layer_per_block'; did you mean 'layers_per_block'"):
        UNetConfig.preset("cifar10-64", layer_per_block=1)
    with pytest.raises(ValueError, match=r"unknown configuration key 'zzz'$"):
        UNetConfig.from_dict({"sample_size": 32, "zzz": 1})


def test_the_size_cannot_be_left_out():
    with pytest.raises(ValueError, match="lacks 'sample_size'"):
        UNetConfig.from_dict({"base_channels": 64})


def test_a_configuration_survives_json(small_config):
    for config in (small_config, *map(UNetConfig.preset, preset_names())):
        values = json.loads(json.dumps(config.to_dict()))
        assert set(values) == {field.name for field in dataclasses.fields(UNetConfig)}
        assert UNetConfig.from_dict(values) == config


def test_lists_and_integers_become_the_fields_types():
    config = UNetConfig(sample_size=32, channel_multipliers=[1, 2], attention_resolutions=[], dropout=0, freq_shift=0)
    assert (config.channel_multipliers, config.attention_resolutions) == ((1, 2), ())
    assert type(config.dropout) is type(config.freq_shift) is float


@pytest.mark.parametrize(
    "name,value,right",
    [
        ("sample_size", 0, "at least 1"),
        ("sample_size", 36, "a multiple of 8, for 4 levels"),
        ("sample_size", 32.0, "an integer"),
        ("sample_size", "32", "an integer"),
        ("sample_size", None, "an integer"),
        ("sample_size", 2**24, "an integer or a pair of integers below 16777216"),
        ("channel_multipliers", (1, 2**63), "a list of integers below 16777216"),
        ("base_channels", 2**20, "such that no level has more than 65536 channels"),
        ("layers_per_block", 10**6, "at most 512 in all levels together"),
        ("num_train_timesteps", 10**7, "at most a million"),
        ("in_channels", 0, "at least 1"),
        ("in_channels", True, "an integer"),
        ("base_channels", -64, "at least 1"),
        ("channel_multipliers", (), "one positive integer per level"),
        ("channel_multipliers", (1, 0), "one positive integer per level"),
        ("channel_multipliers", 2, "a list of integers"),
        ("channel_multipliers", (1, 2.0), "a list of integers"),
        ("channel_multipliers", "12", "a list of integers"),
        ("layers_per_block", 0, "at least 1"),
        ("attention_resolutions", (16, "8"), "a list of integers"),
        ("attention_head_dim", 0, "a divisor of every level's width"),
        ("attention_head_dim", 48, "a divisor of every level's width, 128 among them"),
        ("attention_head_dim", 8.0, "an integer"),
        ("dropout", 1.0, r"in \[0, 1\)"),
        ("dropout", -0.1, r"in \[0, 1\)"),
        ("dropout", NAN, "a finite number"),
        ("dropout", True, "a finite number"),
        ("dropout", 10**400, "a finite number"),
        ("norm_num_groups", 0, "at least 1"),
        ("norm_num_groups", 48, "a divisor of every level's width, 128 among them"),
        ("norm_eps", 0.0, "positive"),
        ("norm_eps", INF, "a finite number"),
        ("flip_sin_to_cos", 1, "true or false"),
        ("freq_shift", "1", "a finite number"),
        ("freq_shift", 64, "other than half of base_channels"),
        ("downsample_padding", 2, "0 or 1"),
        ("num_classes", 0, "at least 1, or null"),
        ("num_classes", "ten", "an integer"),
        ("class_names", ("cat",), "a different name for each of the 0 classes, or null"),
        ("class_names", "cat", "a list of strings"),
        ("guidance", 2.0, "null without classes"),
        ("prediction_type", "eps", "one of epsilon, v_prediction, sample"),
        ("prediction_type", 3, "a string"),
        ("beta_schedule", "lineer", "one of linear, scaled_linear, cosine, sigmoid"),
        ("beta_start", 0.0, "between 0 and 1"),
        ("beta_end", 1.5, "between 0 and 1"),
        ("num_train_timesteps", 0, "at least 1"),
        ("rescale_betas_zero_snr", "false", "true or false"),
    ],
)
def test_impossible_values_are_named(name, value, right):
    with pytest.raises(ValueError, match=f"^{name} must be {right}"):
        UNetConfig(**{"sample_size": 32, name: value})


@pytest.mark.parametrize("names", [("cat",), ("cat", "cat"), ("cat", "dog", "horse")])
def test_each_class_has_a_name_of_its_own(names):
    with pytest.raises(ValueError, match=r"^class_names must be a different name for each of the 2 classes"):
        UNetConfig(sample_size=32, num_classes=2, class_names=names)


def test_a_recommended_scale_guides():
    with pytest.raises(ValueError, match=r"^guidance must be at least 1"):
        UNetConfig(sample_size=32, num_classes=2, guidance=0.5)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        UNetConfig(sample_size=32).sample_size = 64
