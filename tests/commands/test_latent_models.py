"""Models of latents, from their training to what the commands make of them."""

import json
import sys

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ddim_fast import UNet, evaluate, export, interpolate, reconstruct, sample, train
from ddim_fast.cli.parser import run_command

COMMON = ("--batch-size=4", "--warmup=0", "--dtype=float32", "--device=cpu", "--quiet")
AUTOENCODER = ("sample_size=16", "in_channels=1", "latent_channels=2", "base_channels=8", "channel_multipliers=[1,2]")
NETWORK = ("base_channels=8", "channel_multipliers=[1,2]", "layers_per_block=1", "attention_resolutions=[4]")


def run_train(*arguments) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["train", *map(str, arguments)])
        run_command(train.main)
    return stop.value.code


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with photos, an autoencoder trained on them, and a class-conditional model of its latents."""
    runs = tmp_path_factory.mktemp("runs")
    for i in range(8):
        (runs / "photos" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(90 * (i % 2)).resize((16, 16)).save(runs / "photos" / f"{i % 2}" / f"{i}.png")
    data = ("--data", runs / "photos")
    fields = ("--set", *AUTOENCODER, "norm_num_groups=4")
    assert run_train(*data, "--preset=autoencoder", *fields, "--steps=20", *COMMON, "--out", runs / "ae") == 0
    latents = ("--latents", runs / "ae", "--preset=grey-32", "--set", *NETWORK, "norm_num_groups=4")
    model = ("--class-conditional", "--steps=4", "--save-every=2", *COMMON, "--out", runs / "model")
    assert run_train(*data, *latents, *model) == 0
    return runs


def test_the_checkpoint_is_whole(runs):
    config = UNet.from_pretrained(runs / "model").config
    assert config.image_shape == (2, 8, 8) and config.num_classes == 2
    assert load_file(runs / "model/autoencoder/model.safetensors").keys() == load_file(runs / "ae/model.safetensors").keys()
    # Ten photos at most and what the autoencoder makes of them; forty samples.
    assert Image.open(runs / "ae/samples/0000020.png").size == (2 + 8 * 18, 2 + 2 * 18)
    assert Image.open(runs / "model/samples/0000004.png").size == (2 + 10 * 18, 2 + 4 * 18)


def test_sampling(runs, run_here, here):
    code, out, _ = run_here(sample, "--model", runs / "model", "--seeds=0-2", "--steps=3", "--trajectory=film.gif", "--out=s")
    assert code == 0 and "3 images of 3 steps" in out
    assert Image.open(here / "s/000001.png").size == (16, 16) and Image.open(here / "film.gif").size[0] == 4 * (2 + 3 * 18)
    settings = json.loads((here / "s/record.json").read_text())["settings"]
    # Another autoencoder makes other images of the same latents: then it is another model.
    file = runs / "model/autoencoder/model.safetensors"
    stored = file.read_bytes()
    try:
        run_train_autoencoder_again(file)
        code, _, error = run_here(sample, "--model", runs / "model", "--seeds=0-2", "--steps=3", "--out=s")
    finally:
        file.write_bytes(stored)
    assert code == 2 and settings["model"].startswith("sha256:") and "model" in error


def run_train_autoencoder_again(file):
    from safetensors.torch import save_file

    weights = load_file(file)
    save_file({**weights, "latent_mean": weights["latent_mean"] + 1}, file)


def test_reconstruction_and_interpolation(runs, run_here, here):
    photo = runs / "photos/0/0.png"
    code, out, _ = run_here(reconstruct, photo, "--model", runs / "model", "--steps=3", "--class=1")
    assert code == 0 and "1 image encoded and decoded" in out
    assert load_file(here / "reconstruction/latents.safetensors")["x_T"].shape == (1, 2, 8, 8)
    assert Image.open(here / "reconstruction/comparison.png").size == (4 * 20, 4 * (2 + 2 * 18))  # no row of noise
    code, out, _ = run_here(interpolate, "seed:1", photo, "--model", runs / "model", "--steps=3", "--frames=3")
    assert code == 0 and Image.open(here / "interpolation/1.png").size == (16, 16)


def test_a_run_resumes_with_its_own_copy_of_the_autoencoder(runs, tmp_path):
    """The one it was given may be gone."""
    import shutil

    shutil.copytree(runs / "model", tmp_path / "model")
    record = json.loads((tmp_path / "model/train.json").read_text())
    (tmp_path / "model/train.json").write_text(json.dumps({**record, "latents": "gone"}))
    assert run_train("--out", tmp_path / "model", "--resume", "--steps=6", "--quiet") == 0
    assert torch.load(tmp_path / "model/training_state.pt", weights_only=True)["step"] == 6


def test_an_exported_checkpoint_keeps_its_autoencoder(runs, run_here, here):
    code, _, err = run_here(export, "--to=checkpoint", "--model", runs / "model", "--out=small")
    assert (code, err) == (0, "")
    for model in (runs / "model", here / "small"):
        assert run_here(sample, "--model", model, "--seeds=0", "--steps=3", f"--out={model.name}-images", "--quiet")[0] == 0
    assert (here / "small-images/000000.png").read_bytes() == (here / "model-images/000000.png").read_bytes()


def test_what_is_not_done_in_latent_space(runs, run_here):
    for command, arguments, why in (
        (export, ("--to=onnx", "--out=o"), "other programs' formats have no place for its autoencoder"),
        (export, ("--to=diffusers", "--out=o"), "other programs' formats have no place for its autoencoder"),
        (evaluate, ("--loss", "--data", runs / "photos"), "sample it with --out FILE.npz, and give that to --images"),
    ):
        code, out, error = run_here(command, "--model", runs / "model", *arguments)
        assert (code, out) == (2, "") and error.count("\n") == 1 and why in error
    code, _, error = run_here(sample, "--engine=onnx", "--model", runs / "model")
    assert code == 2 and error.count("\n") == 1 and "latents, which needs torch: leave out --engine onnx" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset=autoencoder", "--latents=x"), "--latents is for training a network on latents"),
        (("--preset=autoencoder", "--class-conditional"), "--class-conditional is for diffusion models"),
        (("--preset=autoencoder", "--set", "sample_size=15"), "sample_size must be a multiple of 4"),
        (("--latents=nowhere",), "nowhere is not a checkpoint: it has no config.json"),
    ],
)
def test_wrong_options(arguments, message, runs, tmp_path, capsys):
    assert run_train("--data", runs / "photos", *arguments, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_a_foreign_autoencoder_with_a_weight_that_is_not_finite_is_refused(runs, tmp_path, capsys):
    channels = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    foreign = diffusers.AutoencoderTiny(**channels, num_encoder_blocks=(1,), num_decoder_blocks=(1,))
    torch.nn.init.constant_(foreign.encoder.layers[0].bias, torch.nan)
    foreign.save_pretrained(tmp_path / "foreign")
    assert run_train("--data", runs / "photos", "--latents", tmp_path / "foreign", "--out", tmp_path / "run") == 2
    message = f"{tmp_path}/foreign/diffusion_pytorch_model.safetensors: tensor 'encoder.layers.0.bias' is not finite"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["encoder.layers.0.bias", "another"])
def test_a_foreign_autoencoder_with_a_missing_or_unknown_weight_is_refused(name, runs, tmp_path, capsys):
    """diffusers would draw it at random, or ignore it."""
    channels = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    foreign = diffusers.AutoencoderTiny(**channels, num_encoder_blocks=(1,), num_decoder_blocks=(1,))
    foreign.save_pretrained(tmp_path / "foreign")
    path = tmp_path / "foreign" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({**{n: t for n, t in state.items() if n != name}, **({} if name in state else {name: torch.zeros(1)})}, path)
    assert run_train("--data", runs / "photos", "--latents", tmp_path / "foreign", "--out", tmp_path / "run") == 2
    assert f"foreign: not a whole AutoencoderTiny of diffusers (tensor '{name}' is missing" in capsys.readouterr().err


def test_a_foreign_autoencoder_of_another_kind_is_refused(runs, tmp_path, capsys):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text(json.dumps({"_class_name": "os.system"}))
    assert run_train("--data", runs / "photos", "--latents", tmp_path / "foreign", "--out", tmp_path / "run") == 2
    assert "'os.system' is not supported; use AutoencoderKL or AutoencoderTiny" in capsys.readouterr().err
