"""Damaged descriptions of networks: of ours, of autoencoders, of diffusers, of sounds, and fitted timesteps."""

import dataclasses

import numpy as np
import pytest

from ddim_fast import Autoencoder, NoiseSchedule, UNet, UNetConfig
from ddim_fast.io.files import write_json
from ddim_fast.models.audio import AudioConfig
from ddim_fast.models.checkpoint import save_checkpoint, save_timesteps
from ddim_fast.models.config import AutoencoderConfig
from ddim_fast.models.formats.diffusers import save_diffusers
from tests.helpers.fuzzing import Fuzzer, main, mutate_json

SMALL = UNetConfig(
    sample_size=8,
    base_channels=8,
    channel_multipliers=(1, 2),
    layers_per_block=1,
    attention_resolutions=(4,),
    norm_num_groups=4,
    num_classes=3,
)


def load(folder):
    """The network and its process, as a sampler takes them."""
    model = UNet.from_pretrained(folder)
    assert np.isfinite(NoiseSchedule.from_config(model.config).alphas_cumprod).all()


def write_ours(folder):
    UNet(SMALL).save_pretrained(folder)
    return [folder / "config.json"]


def write_autoencoder(folder):
    Autoencoder(AutoencoderConfig(sample_size=8, base_channels=8)).save_pretrained(folder)
    return [folder / "config.json"]


def write_diffusers(folder):
    save_diffusers(folder, SMALL, UNet(SMALL).state_dict())
    return [folder / "model_index.json", folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"]


def write_audio(folder):
    config = dataclasses.replace(SMALL, in_channels=4, num_classes=2)
    sound = AudioConfig(kind="mel", sample_rate=8000, length=2048, fold=2, hop=128, n_fft=256, mels=16)
    save_checkpoint(folder, config, UNet(config).state_dict(), sound)
    write_json(folder / "audio.json", {**sound.to_dict(), "labels": ["0", "1"]})  # as version 0.1 wrote it
    return [folder / "audio.json"]


def write_timesteps(folder):
    UNet(SMALL).save_pretrained(folder)
    return [save_timesteps(folder, {"ddim": {2: [999, 0], 3: [999, 500, 0]}}, {"seeds": "0-3"})]


def load_pipeline(path):
    load(path.parent if path.name == "model_index.json" else path.parents[1])


FUZZERS = (
    Fuzzer("config", write_ours, lambda path: load(path.parent), mutate_json),
    Fuzzer("autoencoder", write_autoencoder, lambda path: Autoencoder.from_pretrained(path.parent), mutate_json),
    Fuzzer("diffusers", write_diffusers, load_pipeline, mutate_json),
    Fuzzer("audio", write_audio, lambda path: load(path.parent), mutate_json),
    Fuzzer("timesteps", write_timesteps, lambda path: load(path.parent), mutate_json),
)


@pytest.mark.parametrize("fuzzer", FUZZERS, ids=lambda fuzzer: fuzzer.name)
def test_damaged_descriptions(fuzzer):
    fuzzer.check(100)


if __name__ == "__main__":
    main(*FUZZERS)
