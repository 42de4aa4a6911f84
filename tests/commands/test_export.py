import functools

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel

from ddim_fast import Sampler, UNet, UNetConfig, export, sample
from ddim_fast.models.checkpoint import save_timesteps
from ddim_fast.training.averages import PowerAverages, exponent_of_length


@pytest.fixture
def checkpoint(small_unet, tmp_path):
    """A class-conditional network's folder."""
    small_unet.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def unconditional(tmp_path):
    torch.manual_seed(0)
    model = UNet(UNetConfig(sample_size=16, base_channels=16, channel_multipliers=(1, 2), norm_num_groups=8))
    torch.nn.init.normal_(model.conv_out.weight, std=0.05)
    model.save_pretrained(tmp_path / "unconditional")
    return tmp_path / "unconditional"


@pytest.fixture
def run(run_here):
    return functools.partial(run_here, export)


def load(folder):
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_pipeline_of_diffusers_is_written(run, unconditional, tmp_path):
    out = tmp_path / "deep" / "out"
    code, said, err = run("--to", "diffusers", "--model", unconditional, "--out", out)
    assert (code, err) == (0, "")
    assert said == f"wrote {out}; load it with diffusers.DDIMPipeline.from_pretrained({str(out)!r})\n"
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    images = load(out)(2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all() and images.std() > 0.01


def test_what_is_written_samples_like_what_was_read(run, run_here, checkpoint, tmp_path):
    run("--to", "diffusers", "--model", checkpoint, "--class", "all", "--out", tmp_path / "theirs")
    for model in ("checkpoint", "theirs"):
        options = ("--steps", 2, "--seeds", "0,5", "--class", "3", "--out", tmp_path / f"{model}-images")
        code, _, err = run_here(sample, "--model", tmp_path / model, *options, "--quiet")
        assert (code, err) == (0, "")
    for name in ("000000.png", "000005.png"):
        images = [(tmp_path / f"{model}-images" / name).read_bytes() for model in ("checkpoint", "theirs")]
        assert images[0] == images[1]


@torch.no_grad()
def test_a_network_that_a_pipeline_cannot_sample_is_written_only_when_it_is_asked_for(run, checkpoint, small_unet, tmp_path):
    command = ["--to", "diffusers", "--model", checkpoint, "--out", tmp_path / "out"]
    code, said, err = run(*command)
    assert (code, said) == (2, "") and err.count("\n") == 1
    assert f"--model {checkpoint} has 10 classes, and a DDIMPipeline gives its network none" in err and "--class N" in err
    assert not (tmp_path / "out").exists()
    code, said, _ = run(*command, "--class", "all")
    assert code == 0 and "class_labels 0..9, and 10 for no label" in said and "DDIMPipeline.from_pretrained" not in said
    network = UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    assert network.config.num_class_embeds == 11
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([5, 700]), torch.tensor([3, 10])
    torch.testing.assert_close(network(x, t, labels).sample, small_unet(x, t, labels), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="class_labels should be provided"):  # why: a DDIMPipeline gives none
        load(tmp_path / "out")(1, num_inference_steps=1)


@pytest.mark.parametrize("options", [[], ["--class", "0"], ["--class", "all"]])
def test_sounds_are_no_pictures_of_a_pipeline(options, run, tmp_path):
    code, said, err = run("--to", "diffusers", "--model", "spoken-digits", *options, "--out", tmp_path / "out")
    assert (code, said) == (2, "") and "--model spoken-digits makes sounds" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_pipeline_samples_other_predictions_too(prediction_type, run, tmp_path):
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8, base_channels=16, channel_multipliers=(1,), norm_num_groups=8, prediction_type=prediction_type
    )
    model = UNet(config)
    torch.nn.init.normal_(model.conv_out.weight, std=0.05)
    model.save_pretrained(tmp_path / "model")
    assert run("--to", "diffusers", "--model", tmp_path / "model", "--out", tmp_path / "out")[0] == 0
    pipeline = load(tmp_path / "out")
    theirs = pipeline(1, generator=torch.manual_seed(1), num_inference_steps=5, output_type="pt").images
    noise = torch.randn(1, 3, 8, 8, generator=torch.manual_seed(1))
    ours = Sampler(model, steps=None, spacing=pipeline.scheduler.timesteps.tolist()).sample(x_T=noise)
    torch.testing.assert_close(theirs, (ours / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("label,row", [("3", 3), ("none", 10)])
def test_one_class_is_a_pipeline_of_its_own(label, row, run, checkpoint, small_unet, tmp_path):
    code, said, _ = run("--to", "diffusers", "--model", checkpoint, "--class", label, "--out", tmp_path / "out")
    assert code == 0 and "--class" not in said
    pipeline = load(tmp_path / "out")
    assert pipeline(1, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 700])
    expected = small_unet(x, t, torch.tensor([row, row]))
    torch.testing.assert_close(pipeline.unet(x, t).sample, expected, atol=1e-5, rtol=1e-5)


def test_a_class_is_called_by_name(run, tmp_path):
    for label in ("4", "Deer"):
        options = ("--to", "checkpoint", "--model", "cifar10-small", "--class", label)
        assert run(*options, "--out", tmp_path / label)[0] == 0
    first, second = (UNet.from_pretrained(tmp_path / label) for label in ("4", "Deer"))
    assert first.config == second.config and first.config.class_names is None and first.config.guidance is None
    assert all(torch.equal(weight, second.state_dict()[name]) for name, weight in first.state_dict().items())


def test_an_unconditional_network_has_no_classes(run, unconditional, tmp_path):
    code, _, err = run("--to", "diffusers", "--model", unconditional, "--class", "3", "--out", tmp_path / "out")
    assert code == 2 and "the network is unconditional: it has no classes" in err
    assert not (tmp_path / "out").exists()


def _with_code(path):
    class Payload:
        def __reduce__(self):
            return open, (str(path.parent / "executed"), "w")

    torch.save({"conv_in.weight": Payload()}, path)


@pytest.mark.parametrize(
    "write,message",
    [
        (lambda path: path.write_bytes(b"garbage"), "model.ckpt: not a whole file of tensors; copy or download it again"),
        (lambda path: torch.save({"conv_in.bias": torch.zeros(3)}, path), "model.ckpt: missing tensor 'conv_in.weight'"),
        (_with_code, "which is not data and was not executed"),
    ],
    ids=["garbage", "no network", "code"],
)
@pytest.mark.parametrize("command", [export, sample], ids=["export", "sample"])
def test_a_bad_file_is_one_line_and_exit_code_1(command, write, message, run_here, tmp_path):
    write(tmp_path / "model.ckpt")
    to = ["--to", "diffusers"] if command is export else []
    code, out, err = run_here(command, *to, "--model", tmp_path / "model.ckpt", "--out", tmp_path / "out")
    assert code == 1
    assert message in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "out").exists() and not (tmp_path / "executed").exists()


def test_a_schedule_that_diffusers_lacks_is_one_line_and_exit_code_1(run, small_config, tmp_path):
    config = UNetConfig.from_dict({**small_config.to_dict(), "beta_schedule": "sigmoid"})
    UNet(config).save_pretrained(tmp_path / "sigmoid")
    code, out, err = run("--to", "diffusers", "--model", tmp_path / "sigmoid", "--class", "3", "--out", tmp_path / "out")
    assert code == 1 and "beta_schedule 'sigmoid'" in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "out").exists()


def test_help_shows_examples_and_defaults(run):
    code, out, _ = run("--help")
    assert code == 0 and "examples:" in out and "--to diffusers" in out and "(default: cifar10-64)" in " ".join(out.split())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_in_parts(dtype, run, checkpoint, small_unet, tmp_path):
    save_timesteps(checkpoint, {"ddim": {2: [700, 3]}}, {})
    options = ("--dtype", dtype, "--max-shard-size", "50KB")
    code, said, err = run("--to", "checkpoint", "--model", checkpoint, *options, "--out", tmp_path / "out")
    assert (code, err) == (0, "") and said.startswith(f"wrote {tmp_path / 'out'}; python -m ddim_fast.sample --model")
    shards = sorted(tmp_path.glob("out/model-*-of-*.safetensors"))
    largest = max(tensor.numel() for tensor in small_unet.state_dict().values()) * (4 if dtype == "float32" else 2)
    assert len(shards) > 3 and max(file.stat().st_size for file in shards) < max(50_000, largest) + 10_000
    loaded = UNet.from_pretrained(tmp_path / "out")
    assert loaded.config == small_unet.config and loaded.fitted_timesteps == {"ddim": {2: [700, 3]}}
    for name, weight in small_unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(getattr(torch, dtype)).float())

    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        UNet.from_pretrained(tmp_path / "out")


def test_a_class_of_a_checkpoint(run, checkpoint, small_unet, tmp_path):
    save_timesteps(checkpoint, {"ddim": {2: [700, 3]}}, {})
    code, _, err = run("--to", "checkpoint", "--model", checkpoint, "--class", "3", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    loaded, (x, t) = UNet.from_pretrained(tmp_path / "out"), (torch.randn(2, 3, 16, 16), torch.tensor([5, 700]))
    assert loaded.fitted_timesteps is None  # those are of all classes
    torch.testing.assert_close(loaded(x, t), small_unet(x, t, torch.tensor([3, 3])), atol=1e-5, rtol=1e-5)


def test_an_average_of_another_length(run, checkpoint, small_unet, tmp_path):
    save_timesteps(checkpoint, {"ddim": {2: [700, 3]}}, {})
    model = UNet.from_pretrained(checkpoint)
    averages = PowerAverages(model)
    for step in range(40):
        torch.nn.init.constant_(model.conv_in.bias, step)
        averages.update(step)
        averages.write_snapshot(checkpoint / "ema", step + 1)
    for length in (0.05, 0.1, 0.2):
        out = tmp_path / f"{length}"
        code, said, err = run("--to", "checkpoint", "--model", checkpoint, "--ema-length", length, "--out", out)
        assert said.startswith(f"average of length {length} over 40 steps of training; its averaging profile is 0.")
        loaded = UNet.from_pretrained(out)
        share = exponent_of_length(length) + 1
        # The weights were the numbers of the steps, whose mean under tau^gamma this is.
        assert (code, err) == (0, "")
        assert float(loaded.conv_in.bias.detach().mean()) == pytest.approx(40 * share / (share + 1) - 0.5, abs=0.3)
        assert loaded.fitted_timesteps is None  # they were fitted to other weights
        torch.testing.assert_close(loaded.conv_out.weight, small_unet.conv_out.weight, atol=1e-4, rtol=1e-3)


def test_a_checkpoint_is_widened(run, tmp_path):
    code, _, err = run("--to", "checkpoint", "--widen", "cifar10-128", "--model", "cifar10-64", "--out", tmp_path / "wide")
    assert (code, err) == (0, "")
    wide, narrow = UNet.from_pretrained(tmp_path / "wide"), UNet.from_pretrained("cifar10-64")
    assert wide.config.level_channels == UNetConfig.preset("cifar10-128").level_channels
    assert wide.config.class_names == narrow.config.class_names
    assert wide.fitted_timesteps == narrow.fitted_timesteps  # they hold: the function is the same
    x, t, labels = torch.randn(2, 3, 32, 32), torch.tensor([5, 700]), torch.tensor([3, 10])
    torch.testing.assert_close(wide(x, t, labels), narrow(x, t, labels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options,message",
    [
        (["--to=checkpoint", "--widen=celeba-64"], "--widen celeba-64: a network of twice the channels has sample_size 32"),
        (["--to=checkpoint", "--widen=cifar"], "--widen: invalid choice: 'cifar'"),
        (["--to=onnx", "--widen=cifar10-128"], "--widen is an option of --to checkpoint"),
    ],
)
def test_a_network_that_is_not_twice_as_wide_is_refused(options, message, run, tmp_path):
    code, _, err = run(*options, "--model", "cifar10-64", "--out", tmp_path / "out")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
