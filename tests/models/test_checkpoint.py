import json
import math
import os
import socket
import stat
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddim_fast import UNet, UNetConfig
from ddim_fast.io.files import atomic_write
from ddim_fast.models.checkpoint import packaged_models, resolve_model, save_checkpoint


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every attempt to reach the network is an error, also one that the caller would swallow."""
    attempts = []

    def refuse(*arguments, **options):
        attempts.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not attempts


@pytest.fixture
def config() -> UNetConfig:
    return UNetConfig(
        sample_size=8,
        base_channels=8,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        attention_resolutions=(4,),
        norm_num_groups=4,
        num_classes=3,
    )


@pytest.fixture
def checkpoint(config, tmp_path):
    """A folder with a checkpoint."""
    torch.manual_seed(0)
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, config, UNet(config).state_dict())
    return folder


def test_a_saved_network_comes_back_bit_for_bit(small_unet, tmp_path):
    small_unet.train().save_pretrained(tmp_path / "model")
    loaded = UNet.from_pretrained(tmp_path / "model")
    assert loaded.config == small_unet.config
    assert list(loaded.state_dict()) == list(small_unet.state_dict())
    for name, tensor in small_unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert {p.name for p in (tmp_path / "model").iterdir()} >= {"config.json", "model.safetensors"}


def test_a_loaded_network_is_ready_to_sample_and_to_train(checkpoint):
    model = UNet.from_pretrained(str(checkpoint))
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_saving_over_an_older_checkpoint_replaces_it(checkpoint, small_unet):
    small_unet.save_pretrained(checkpoint)
    assert UNet.from_pretrained(checkpoint).config == small_unet.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision_load_as_float32(dtype, checkpoint):
    path = checkpoint / "model.safetensors"
    stored = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(stored, path)
    for name, tensor in UNet.from_pretrained(checkpoint).state_dict().items():
        assert torch.equal(tensor, stored[name].float()) and tensor.dtype == torch.float32, name


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:20], lambda b: b"", lambda b: b"garbage" * 100])
def test_damaged_weights_are_named(damage, checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        UNet.from_pretrained(checkpoint)


def test_what_a_library_says_of_damaged_weights_is_one_line(checkpoint):
    header = b'{"a\\nb": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=r"^.*model\.safetensors: not a whole safetensors file .*$") as caught:
        UNet.from_pretrained(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_missing_part_of_the_weights_is_named_by_their_index(checkpoint, config):
    state = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    save_checkpoint(checkpoint, config, state, max_shard_size="5KB")
    part = sorted(checkpoint.glob("model-*"))[2]
    part.unlink()
    with pytest.raises(FileNotFoundError, match=rf"model\.safetensors\.index\.json: there is no '{part.name}' beside it"):
        UNet.from_pretrained(checkpoint)


def _rename(state):
    state["conv_uit.weight"] = state.pop("conv_out.weight")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda state: state.pop("conv_out.bias"), r"model\.safetensors: missing tensor 'conv_out\.bias'"),
        (lambda state: state.update(extra=torch.zeros(1)), r"model\.safetensors: unexpected tensor 'extra'"),
        (_rename, r"model\.safetensors: missing tensor 'conv_out\.weight'"),
        (
            lambda state: state.update({"conv_in.weight": torch.zeros(8, 1, 3, 3)}),
            r"model\.safetensors: tensor 'conv_in\.weight' has shape \(8, 1, 3, 3\), .* needs \(8, 3, 3, 3\)",
        ),
    ],
)
def test_weights_of_another_network_are_named(change, message, checkpoint):
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "value,dtype", [(math.nan, torch.float32), (math.inf, torch.float16), (-math.inf, torch.bfloat16), (1e300, torch.float64)]
)
@pytest.mark.parametrize("shard_size", [None, "5KB"])
def test_a_weight_that_is_not_finite_is_named(value, dtype, shard_size, checkpoint, config):
    state = {name: tensor.to(dtype) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    state["mid_block.resnets.0.conv1.weight"][1, 2, 0, 1] = value
    (checkpoint / "model.safetensors").unlink()
    save_checkpoint(checkpoint, config, state, max_shard_size=shard_size)
    with pytest.raises(ValueError, match=r"model\.safetensors\S*: tensor 'mid_block\.resnets\.0\.conv1\.weight' is not finite"):
        UNet.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"sample_size": 8, "base_chanels": 8}', "unknown configuration key 'base_chanels'; did you mean 'base_channels'"),
        ('{"sample_size": 8, "dropout": "big"}', "dropout must be a finite number; got 'big'"),
        ('{"sample_size": 8, "dropout": 1' + "0" * 400 + "}", "dropout must be a finite number"),
        ('{"base_channels": 8}', "lacks 'sample_size'"),
        ('{"sample_size": ', "Expecting value"),
        ("", "Expecting value"),
        ("[1, 2]", "not a JSON object"),
        ("null", "not a JSON object"),
        ("[" * 100_000, "recursion"),
        ("\udcff\udcfe", "utf-8"),
    ],
    ids=["unknown key", "wrong type", "huge number", "missing key", "cut off", "empty", "list", "null", "deep", "not text"],
)
def test_damaged_configurations_are_named(text, message, checkpoint):
    (checkpoint / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json: .*" + message):
        UNet.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files_are_named(name, checkpoint):
    (checkpoint / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"checkpoint is not a checkpoint: it has no {name}"):
        UNet.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "../x", "a/b/c"])
def test_an_unknown_model_names_those_there_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = ", ".join(packaged_models()) or "there are none"
    with pytest.raises(FileNotFoundError) as caught:
        UNet.from_pretrained(name)
    assert str(caught.value) == f"unknown model {name!r}: neither a folder or file nor a packaged model ({packaged})"


def test_a_missing_folder_beside_others_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == "owner/name"
    (tmp_path / "owner").mkdir()
    with pytest.raises(FileNotFoundError, match="unknown model 'owner/name'"):
        resolve_model("owner/name")


def test_every_packaged_model_loads():
    for name in packaged_models():
        assert UNet.from_pretrained(name).config.sample_size


def test_the_configuration_is_readable_json_with_every_field(checkpoint, config):
    assert json.loads((checkpoint / "config.json").read_text()) == config.to_dict()


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, b"old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(failing, tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask,mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_modes_follow_the_umask(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        atomic_write(tmp_path / "file", b"")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
