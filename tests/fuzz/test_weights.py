"""Damaged files of weights: safetensors in one file and in several, pickles of diffusers and of the DDIM authors' code."""

import io
import math
import struct
import zipfile
from unittest import mock

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from ddim_fast import UNet
from ddim_fast.evaluation import inception
from ddim_fast.evaluation.inception import _Conv, load_inception
from ddim_fast.interop.autoencoder import load_autoencoder
from ddim_fast.models.checkpoint import save_checkpoint
from ddim_fast.models.formats.diffusers import save_diffusers
from ddim_fast.models.formats.ermongroup import _stored_name
from ddim_fast.training.averages import PowerAverages, average_of_length
from tests.fuzz.test_config import SMALL
from tests.helpers.fuzzing import Fuzzer, main, mutate_bytes, mutate_json


def load(path):
    model = UNet.from_pretrained(path)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def network(config=SMALL):
    """The same at each call: then an input is the same in each process."""
    torch.manual_seed(0)
    return UNet(config)


def write_one(folder):
    network().save_pretrained(folder)
    return [folder / "model.safetensors"]


def write_shards(folder):
    save_checkpoint(folder, SMALL, network().state_dict(), max_shard_size="20KB")
    return sorted(folder.glob("model*"))


def write_bin(folder):
    save_diffusers(folder, SMALL, network().state_dict())
    weights = folder / "unet" / "diffusion_pytorch_model.bin"
    torch.save(network().state_dict(), weights)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return [weights]


def write_ermongroup(folder):
    """The list that their training writes, in both formats of torch.save, and the network alone."""
    tensors = {_stored_name(name, levels=2): tensor for name, tensor in network(ERMONGROUP).state_dict().items()}
    tensors = {name: t[..., None, None] if ".attn" in name and t.ndim == 2 else t for name, t in tensors.items()}
    states = [tensors, {"state": {0: {"step": 3}}}, 1, 5, {f"module.{name}": tensor for name, tensor in tensors.items()}]
    torch.save(states, folder / "new.ckpt")
    torch.save(states, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "network.safetensors")
    return sorted(folder.iterdir())


def write_snapshots(folder):
    averages = PowerAverages(network())
    for step in (1, 2, 5):
        averages.write_snapshot(folder / "ema", step)
    return sorted((folder / "ema").iterdir())


class TinyInception(torch.nn.Module):
    """In place of the network of FID, whose weights take 95 MB."""

    def __init__(self):
        super().__init__()
        self.first, self.last = _Conv(3, 4, 3), _Conv(4, 8, 1)


def write_inception(folder):
    torch.manual_seed(0)
    state = TinyInception().state_dict()
    state = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    save_file(state, folder / "a.safetensors")
    torch.save(state, folder / "a.pth")
    return sorted(folder.iterdir())


def read_inception(path):
    with mock.patch.object(inception, "Inception", TinyInception):
        load_inception(path, name="mine")


def write_kl(folder):
    """An autoencoder of diffusers."""
    torch.manual_seed(0)
    diffusers.AutoencoderKL(norm_num_groups=4, block_out_channels=(4,)).save_pretrained(folder / "vae")
    return sorted((folder / "vae").iterdir())


ERMONGROUP = SMALL.__class__(
    sample_size=32, base_channels=32, channel_multipliers=(1, 1), layers_per_block=1, attention_resolutions=(16,)
)


def mutate_safetensors(random, data):
    """Also its header alone, as JSON, with the length that it then has."""
    if random.random() < 0.4:
        return mutate_bytes(random, data)
    (length,) = struct.unpack("<Q", data[:8])
    header = mutate_json(random, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutate_pickle(random, data):
    """Also what it holds, saved anew, and a part of its archive, with a checksum that is right."""
    change = random.randrange(3)
    if change == 0:
        return mutate_bytes(random, data)
    buffer = io.BytesIO()
    if change == 1 and zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
            names = old.namelist()
            damaged = random.choice([name for name in names if name.endswith("data.pkl")] + names)
            for name in names:
                part = old.read(name)
                new.writestr(name, mutate_bytes(random, part) if name == damaged else part)
        return buffer.getvalue()
    content = torch.load(io.BytesIO(data), weights_only=True)
    torch.save(_mutate_content(random, content), buffer)
    return buffer.getvalue()


def _mutate_content(random, value):
    if isinstance(value, list) and random.random() < 0.9:
        at = random.choice([0, -1, random.randrange(len(value))])
        value = list(value)
        value[at] = _mutate_content(random, value[at])
        return value[: len(value) - random.choice((0, 0, 0, 1, 3))]
    if isinstance(value, dict) and value and random.random() < 0.95:
        name = random.choice(list(value))
        rest = {key: kept for key, kept in value.items() if key != name}
        renamed = random.choice((name, name, name, f"module.{name}", f"{name}x", 5, None))
        return rest if random.random() < 0.1 else {**rest, renamed: _mutate_content(random, value[name])}
    if isinstance(value, torch.Tensor) and random.random() < 0.8:
        other = value.clone(memory_format=torch.contiguous_format)
        if other.numel() and other.is_floating_point():
            other.view(-1)[random.randrange(other.numel())] = random.choice((math.nan, math.inf, -math.inf, 1e38, 0.0))
        return random.choice(
            (
                other, other, value.double() * 1e300, value.half(), value.int(), value.bool(), value.flatten()[:0], value[None],
                value.flatten(), value.repeat(2, *[1] * (value.ndim - 1)), value.to_sparse(), value.to("meta"),
                value + 0j, torch.nn.Parameter(value) if value.is_floating_point() else value, value.numpy().tolist(),
            )
        )  # fmt: skip
    return random.choice((None, 3, "x", [], {}, [value], {"x": value}, (value,), torch.zeros(3), {"state_dict": value}))


def mutate_file(random, data):
    """By what it is."""
    if data[:1] == b"{":
        return mutate_json(random, data)
    return (mutate_safetensors if data[8:9] == b"{" else mutate_pickle)(random, data)


FUZZERS = (
    Fuzzer("safetensors", write_one, lambda path: load(path.parent), mutate_file),
    Fuzzer("shards", write_shards, lambda path: load(path.parent), mutate_file),
    Fuzzer("bin", write_bin, lambda path: load(path.parents[1]), mutate_file),
    Fuzzer("ckpt", write_ermongroup, load, mutate_file),
    Fuzzer("snapshots", write_snapshots, lambda path: average_of_length(path.parent, 0.08), mutate_file),
    Fuzzer("Inception", write_inception, read_inception, mutate_file),
    Fuzzer("autoencoder", write_kl, lambda path: load_autoencoder(path.parent), mutate_file),
)


@pytest.mark.parametrize("fuzzer", FUZZERS, ids=lambda fuzzer: fuzzer.name)
def test_damaged_weights(fuzzer):
    fuzzer.check(50)


def test_a_length_beyond_the_end_of_a_pickle_takes_no_memory():
    text = b"\x80\x02X\xff\xff\xff\xffabc"  # of 4 GB, it says
    outcome = Fuzzer("ckpt", write_ermongroup, load, lambda random, data: text).run(3)
    assert outcome.refused == 3, outcome.faults


if __name__ == "__main__":
    main(*FUZZERS)
