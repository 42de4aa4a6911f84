"""Networks as diffusers stores them, written and read back by diffusers itself."""

import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, PNDMScheduler, UNet2DModel
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from ddim_fast import NoiseSchedule, Sampler, UNet, UNetConfig
from ddim_fast.models.formats.diffusers import fold_class, save_diffusers

SMALL = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def make_twin(randomise):
    """A function making a small random UNet2DModel; keywords are its options."""

    def make(**options):
        torch.manual_seed(0)
        return randomise(UNet2DModel(**{**SMALL, **options}))

    return make


@pytest.fixture
def folder(make_twin, tmp_path):
    """A UNet2DModel's folder."""
    make_twin().save_pretrained(tmp_path / "unet2d")
    return tmp_path / "unet2d"


@pytest.fixture
def pipeline(make_twin, tmp_path):
    """A DDPMPipeline's folder."""
    DDPMPipeline(make_twin(), DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def options_of(configured):
    return {key: value for key, value in configured.config.items() if not key.startswith("_")}


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@torch.no_grad()
def assert_equals(model, twin):
    size = model.config.sample_size
    x = torch.randn(3, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0, 3, 999])
    labels = None if model.config.num_classes is None else torch.arange(3) % (model.config.num_classes + 1)
    expected = twin(x, t, class_labels=labels).sample
    assert expected.std() > 0.05
    torch.testing.assert_close(model(x, t, labels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "attention_head_dim": None},
        {"attention_head_dim": 32, "norm_num_groups": 16, "attn_norm_num_groups": 16, "dropout": 0.2},
        {"in_channels": 1, "out_channels": 1, "act_fn": "swish", "time_embedding_dim": 128, "freq_shift": 0.5},
        {"block_out_channels": (32, 32, 96), "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"), "layers_per_block": 2},
        {"num_class_embeds": 3},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)  # fmt: skip
def test_a_network_comes_there_and_back(options, make_twin, tmp_path):
    twin = make_twin(**options)
    twin.save_pretrained(tmp_path / "theirs")
    model = UNet.from_pretrained(tmp_path / "theirs")
    assert not model.training and model.config.dropout == options.get("dropout", 0.0)
    assert_equals(model, twin)

    save_diffusers(tmp_path / "ours", model.config, model.state_dict())
    back = UNet2DModel.from_pretrained(tmp_path / "ours" / "unet")
    assert_same_tensors(back.state_dict(), twin.state_dict())
    says_the_same = {"act_fn": "silu", "time_embedding_dim": None, "attn_norm_num_groups": None}
    before, after = options_of(twin), options_of(back)
    for key in before:
        wanted = says_the_same.get(key, before[key])
        assert after[key] == (list(wanted) if isinstance(wanted, tuple) else wanted), key


def test_the_published_configuration_is_the_preset(folder, tmp_path):
    """config.json of google/ddpm-cifar10-32: what it does not mention has its default."""
    published = {
        "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": None,
        "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0,
        "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
        "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }  # fmt: skip
    config = UNetConfig.preset("cifar10-128", dropout=0.0)
    model = UNet(config)
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text(json.dumps(published))
    save_file(model.state_dict(), tmp_path / "published" / WEIGHTS)
    loaded = UNet.from_pretrained(tmp_path / "published")
    assert loaded.config == config
    assert_same_tensors(loaded.state_dict(), model.state_dict())


def test_what_a_configuration_leaves_out_is_as_in_diffusers(folder):
    expected = UNet.from_pretrained(folder).config
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **SMALL}))
    assert UNet.from_pretrained(folder).config == expected


def _to_bin(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _old_names(state):
    parts = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, old in parts.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    return state


def _to_old_names(folder):
    state = _old_names(load_file(folder / WEIGHTS))
    assert any(name.endswith("attentions.0.proj_attn.bias") for name in state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _to_old_bin(folder):
    _to_old_names(folder)
    _to_bin(folder)


@pytest.mark.parametrize("convert", [_to_bin, _to_old_names, _to_old_bin], ids=lambda f: f.__name__[4:])
def test_the_older_forms_of_weights(convert, folder):
    convert(folder)
    twin = UNet2DModel.from_pretrained(folder).eval()
    model = UNet.from_pretrained(folder)
    assert_same_tensors(model.state_dict(), twin.state_dict())
    assert_equals(model, twin)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_weights_in_several_files(safe, make_twin, tmp_path):
    twin = make_twin()
    twin.save_pretrained(tmp_path / "sharded", max_shard_size="500KB", safe_serialization=safe)
    assert len(list((tmp_path / "sharded").iterdir())) > 3
    assert_same_tensors(UNet.from_pretrained(tmp_path / "sharded").state_dict(), twin.state_dict())


def test_safetensors_come_before_pickles(folder):
    expected = UNet.from_pretrained(folder).state_dict()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    assert_same_tensors(UNet.from_pretrained(folder).state_dict(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_lower_precision_load_as_float32(dtype, make_twin, tmp_path):
    twin = make_twin().to(dtype)
    twin.save_pretrained(tmp_path / "half")
    state = UNet.from_pretrained(tmp_path / "half").state_dict()
    assert_same_tensors(state, {name: tensor.float() for name, tensor in twin.state_dict().items()})


@pytest.mark.parametrize(
    "scheduler,fields",
    [
        (DDPMScheduler(), {}),
        (DDPMScheduler(beta_schedule="sigmoid", beta_end=0.01), {"beta_schedule": "sigmoid", "beta_end": 0.01}),
        (DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="sample"),
         {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "sample"}),
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=400, prediction_type="v_prediction",
                       rescale_betas_zero_snr=True),
         {"beta_schedule": "cosine", "num_train_timesteps": 400, "prediction_type": "v_prediction",
          "rescale_betas_zero_snr": True}),
        (PNDMScheduler(beta_end=0.03), {"beta_end": 0.03}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("is_flat", [False, True], ids=["folders", "flat"])
def test_a_pipelines_scheduler_gives_the_process(scheduler, fields, is_flat, make_twin, tmp_path):
    twin = make_twin()
    folder = tmp_path / "pipeline"
    (DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline)(twin, scheduler).save_pretrained(folder)
    if is_flat:  # as in the oldest pipelines
        for part in ("unet", "scheduler"):
            shutil.copytree(folder / part, folder, dirs_exist_ok=True)
            shutil.rmtree(folder / part)
    model = UNet.from_pretrained(folder)
    plain = UNet.from_pretrained(_unet_alone(twin, tmp_path)).config
    assert model.config == UNetConfig.from_dict({**plain.to_dict(), **fields})
    assert_same_tensors(model.state_dict(), twin.state_dict())
    ours = torch.tensor(NoiseSchedule.from_config(model.config).alphas_cumprod)
    torch.testing.assert_close(ours.float(), scheduler.alphas_cumprod, rtol=2e-6, atol=1e-7)


def _unet_alone(twin, tmp_path):
    twin.save_pretrained(tmp_path / "alone")
    return tmp_path / "alone"


def test_predict_epsilon_is_what_prediction_type_was_called(pipeline):
    path = pipeline / "scheduler" / "scheduler_config.json"
    old = json.loads(path.read_text())
    del old["prediction_type"]
    for value, expected in ((False, "sample"), (True, "epsilon")):
        path.write_text(json.dumps({**old, "predict_epsilon": value}))
        assert UNet.from_pretrained(pipeline).config.prediction_type == expected


BAD_OPTIONS = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": None,
    "out_channels": 6,
    "center_input_sample": True,
    "time_embedding_type": "fourier",
    "time_embedding_dim": 64,
    "freq_shift": "one",
    "flip_sin_to_cos": None,
    "down_block_types": ["DownBlock2D", "ResnetDownsampleBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    "block_out_channels": [32, 48],
    "layers_per_block": 0,
    "mid_block_scale_factor": 1.4,
    "downsample_padding": 2,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "dropout": 1.5,
    "act_fn": "gelu",
    "attention_head_dim": 5,
    "norm_num_groups": 5,
    "attn_norm_num_groups": 8,
    "norm_eps": -1,
    "resnet_time_scale_shift": "scale_shift",
    "add_attention": False,
    "class_embed_type": "timestep",
    "num_class_embeds": 1,
    "extra_conditioning": "heat",
}
MALFORMED_OPTIONS = [
    ("sample_size", [16, 32]),
    ("sample_size", True),
    ("sample_size", 15),
    ("block_out_channels", []),
    ("block_out_channels", [0, 32]),
    ("block_out_channels", [32, "64"]),
    ("block_out_channels", 32),
    ("down_block_types", ["DownBlock2D"]),
    ("down_block_types", [["DownBlock2D"], {}]),
    ("down_block_types", "DownBlock2D"),
    ("up_block_types", 3),
    ("num_class_embeds", "ten"),
]


@pytest.mark.parametrize("key,value", [*BAD_OPTIONS.items(), *MALFORMED_OPTIONS], ids=str)
def test_an_option_that_our_network_lacks_is_named(key, value, folder):
    change_json(folder / "config.json", **{key: value})
    with pytest.raises(ValueError) as caught:
        UNet.from_pretrained(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'config.json'}: {key} ") and repr(value) in message


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("beta_schedule", "laplace", "beta_schedule must be 'linear' or .*; got 'laplace'"),
        ("beta_schedule", ["linear"], r"beta_schedule must be .*; got \['linear'\]"),
        ("prediction_type", "flow_prediction", "prediction_type must be one of .*; got 'flow_prediction'"),
        ("trained_betas", [0.1, 0.2], "trained_betas"),
        ("beta_end", 1.5, "beta_end must be between 0 and 1; got 1.5"),
        ("num_train_timesteps", "many", "num_train_timesteps must be an integer; got 'many'"),
    ],
)
def test_a_process_that_is_not_ours_is_named(key, value, message, pipeline):
    path = pipeline / "scheduler" / "scheduler_config.json"
    change_json(path, **{key: value})
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        UNet.from_pretrained(pipeline)


def test_a_scheduler_without_betas_is_not_ours(pipeline):
    """Those of score matching, of flow matching, of EDM."""
    path = pipeline / "scheduler" / "scheduler_config.json"
    path.write_text('{"_class_name": "ScoreSdeVeScheduler", "sigma_max": 1348.0}')
    with pytest.raises(ValueError, match=f"^{path}: it lacks 'beta_schedule'"):
        UNet.from_pretrained(pipeline)


def test_a_pipeline_with_more_parts_is_refused(pipeline):
    change_json(pipeline / "model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(ValueError, match=r"model_index\.json: the pipeline has scheduler, unet, vqvae; give one with"):
        UNet.from_pretrained(pipeline)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "null", "", "[" * 100_000], ids=["cut off", "list", "null", "empty", "deep"])
def test_damaged_json_is_named(text, name, pipeline):
    (pipeline / name).write_text(text)
    with pytest.raises(ValueError, match=f"^{pipeline / name}: (?!{pipeline})"):
        UNet.from_pretrained(pipeline)


@pytest.mark.parametrize(
    "name,message",
    [
        ("unet/config.json", "unet is not a checkpoint: it has no config.json"),
        (
            f"unet/{WEIGHTS}",
            "unet is not a checkpoint: it has neither diffusion_pytorch_model.safetensors nor",
        ),
        ("scheduler/scheduler_config.json", "scheduler is not a checkpoint: it has no scheduler_config.json"),
    ],
)
def test_a_missing_file_is_named(name, message, pipeline):
    (pipeline / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        UNet.from_pretrained(pipeline)


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:20], lambda b: b"", lambda b: b"garbage" * 100])
def test_damaged_safetensors_are_named(damage, folder):
    path = folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"^{path}: not a whole safetensors file"):
        UNet.from_pretrained(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.bin"])
def test_a_weight_that_is_not_finite_is_named(name, folder):
    state = load_file(folder / WEIGHTS)
    state["conv_out.bias"][0] = torch.inf
    (folder / WEIGHTS).unlink()
    (save_file if name == WEIGHTS else torch.save)(state, folder / name)
    with pytest.raises(ValueError, match=f"^{folder / name}: tensor 'conv_out.bias' is not finite"):
        UNet.from_pretrained(folder)


def test_a_damaged_pickle_is_named(damaged_pickle, folder):
    (folder / WEIGHTS).unlink()
    path = folder / "diffusion_pytorch_model.bin"
    path.write_bytes(damaged_pickle)
    with pytest.raises(ValueError, match=f"^{path}: not a whole file of tensors; copy or download it again$"):
        UNet.from_pretrained(folder)


def test_code_in_a_pickle_is_not_executed(pickle_with_code, folder):
    (folder / WEIGHTS).unlink()
    path = folder / "diffusion_pytorch_model.bin"
    path.write_bytes(pickle_with_code)
    with pytest.raises(ValueError, match=rf"^{path}: it holds \S*open, which is not data and was not executed$"):
        UNet.from_pretrained(folder)


@pytest.mark.parametrize("content", [[1, 2], {"conv_in.weight": 3}, {3: torch.zeros(1)}, {}], ids=str)
def test_a_pickle_without_a_network_is_named(content, folder):
    (folder / WEIGHTS).unlink()
    path = folder / "diffusion_pytorch_model.bin"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"^{path}: not a network's tensors by name"):
        UNet.from_pretrained(folder)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda state: state.pop("mid_block.attentions.0.to_q.bias"), "missing tensor 'mid_block.attentions.0.to_q.bias'"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected tensor 'extra'"),
        (
            lambda state: state.update({"conv_in.weight": torch.zeros(32, 1, 3, 3)}),
            r"tensor 'conv_in.weight' has shape \(32, 1, 3, 3\), the network needs \(32, 3, 3, 3\)",
        ),
    ],
)
@pytest.mark.parametrize("has_old_names", [False, True], ids=["new names", "old names"])
def test_weights_of_another_network_are_named(change, message, has_old_names, folder):
    path = folder / WEIGHTS
    state = load_file(path)
    change(state)
    save_file(_old_names(state) if has_old_names else state, path)
    with pytest.raises(ValueError, match=f"^{path}: {message.replace('to_q', 'query') if has_old_names else message}"):
        UNet.from_pretrained(folder)


@pytest.fixture
def sharded(make_twin, tmp_path):
    make_twin().save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    return tmp_path / "sharded"


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/outside.safetensors", "in/side.safetensors", "..", "", "weights.bin", 3, None]
)
def test_a_shard_outside_the_folder_is_refused(shard, sharded):
    state = load_file(next(sharded.glob("*-00001-of-*")))
    save_file(state, sharded.parent / "outside.safetensors")
    path = sharded / f"{WEIGHTS}.index.json"
    shard_of = json.loads(path.read_text())["weight_map"]
    change_json(path, weight_map={**shard_of, next(iter(state)): shard})
    with pytest.raises(
        ValueError, match=f"^{path}: tensor '{next(iter(state))}' must be in a .safetensors file of the same"
    ) as e:
        UNet.from_pretrained(sharded)
    assert repr(shard) in str(e.value)


def test_an_index_that_does_not_fit_its_shards_is_named(sharded):
    path = sharded / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())["weight_map"]
    shard = index["conv_in.weight"]
    for change, message in (
        ({"conv_xx.weight": shard}, f"{shard}: missing tensor 'conv_xx.weight'"),
        ({"conv_in.weight": next(s for s in index.values() if s != shard)}, f"{shard}: unexpected tensor 'conv_in.weight'"),
    ):
        change_json(path, weight_map={**index, **change})
        with pytest.raises(ValueError, match=message):
            UNet.from_pretrained(sharded)
    change_json(path, weight_map={name: shard for name, shard in index.items() if name != "conv_in.weight"})
    with pytest.raises(ValueError, match=f"{shard}: unexpected tensor 'conv_in.weight'"):
        UNet.from_pretrained(sharded)
    change_json(path, weight_map=["conv_in.weight"])
    with pytest.raises(ValueError, match=f"^{path}: weight_map must give a file for each tensor"):
        UNet.from_pretrained(sharded)
    change_json(path, weight_map=index)
    (sharded / shard).unlink()
    with pytest.raises(FileNotFoundError, match=shard):
        UNet.from_pretrained(sharded)


@pytest.mark.parametrize("form", ["pipeline", "sharded"])
def test_from_the_hub_come_all_files_but_pickles_and_variants(form, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(form)
    part = folder / "unet" if form == "pipeline" else folder
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
        (part / name).write_bytes(b"large")

    def download(model_id, allow_patterns):
        names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, tmp_path / "hub" / name)
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same_tensors(UNet.from_pretrained("someone/network").state_dict(), UNet.from_pretrained(folder).state_dict())
    assert not [p for p in (tmp_path / "hub").rglob("*") if p.is_file() and p.read_bytes() == b"large"]


def test_a_folder_describes_itself(folder):
    with pytest.raises(ValueError, match="give no config"):
        UNet.from_pretrained(folder, config=UNetConfig.preset("cifar10-64"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prediction_type": "v_prediction", "beta_schedule": "cosine"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": "sample", "beta_schedule": "scaled_linear", "beta_start": 0.001, "num_train_timesteps": 500},
    ],
    ids=lambda fields: ",".join(map(str, fields.values())) or "defaults",
)
def test_a_saved_pipeline_makes_the_same_images(fields, randomise, tmp_path):
    torch.manual_seed(0)
    config = UNetConfig(sample_size=16, base_channels=32, channel_multipliers=(1, 2), attention_resolutions=(8,), **fields)
    model = randomise(UNet(config))
    save_diffusers(tmp_path / "saved", config, model.state_dict())
    assert UNet.from_pretrained(tmp_path / "saved").config == config

    pipeline = DDIMPipeline.from_pretrained(tmp_path / "saved")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np").images
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    ours = Sampler(model, spacing=pipeline.scheduler.timesteps.tolist()).sample(x_T=x)
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert ((ours > 0) & (ours < 1)).float().mean() > 0.02  # not all are clipped
    torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-4, rtol=0)
    assert (pipeline.scheduler.timesteps[0] == config.num_train_timesteps - 1) == config.rescale_betas_zero_snr


@torch.no_grad()
def test_a_conditional_network_keeps_its_null_class(small_unet, tmp_path):
    save_diffusers(tmp_path / "saved", small_unet.config, small_unet.state_dict())
    twin = DDIMPipeline.from_pretrained(tmp_path / "saved").unet.eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 700])
    for ours, theirs in ((torch.tensor([3, 9]), torch.tensor([3, 9])), (None, torch.tensor([10, 10]))):
        expected = twin(x, t, class_labels=theirs).sample
        torch.testing.assert_close(small_unet(x, t, ours), expected, atol=1e-5, rtol=1e-5)
    back = UNet.from_pretrained(tmp_path / "saved")
    assert back.config == small_unet.config
    assert_same_tensors(back.state_dict(), small_unet.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("label", [0, 9, None])
def test_a_class_becomes_a_network_of_its_own(label, small_unet):
    before = {name: tensor.clone() for name, tensor in small_unet.state_dict().items()}
    config, state = fold_class(small_unet.config, small_unet.state_dict(), label)
    folded = UNet(config).eval()
    folded.load_state_dict(state)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 700])
    expected = small_unet(x, t, None if label is None else torch.full((2,), label))
    torch.testing.assert_close(folded(x, t), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, small_unet(x, t, torch.tensor([4, 4])), atol=1e-4)
    assert_same_tensors(small_unet.state_dict(), before)


def test_only_a_class_there_is_can_be_folded(small_unet):
    config, state = small_unet.config, small_unet.state_dict()
    for label in (-1, 10):
        with pytest.raises(ValueError, match=rf"class {label} is out of range: the network has classes 0\.\.9"):
            fold_class(config, state, label)
    with pytest.raises(ValueError, match="unconditional"):
        fold_class(*fold_class(config, state, None), None)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ({"channel_multipliers": (2, 4)}, r"channel_multipliers must begin with 1 .*; got \[2, 4\]"),
    ],
)
def test_what_diffusers_lacks_is_not_saved(fields, message, tmp_path):
    config = UNetConfig(**{"sample_size": 16, "base_channels": 32, "channel_multipliers": (1,), **fields})
    with pytest.raises(ValueError, match=message):
        save_diffusers(tmp_path / "saved", config, UNet(config).state_dict())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_in_use_is_left_alone(small_unet, tmp_path):
    (tmp_path / "kept").write_text("kept")
    for folder in (tmp_path, tmp_path / "kept"):
        with pytest.raises(FileExistsError, match=f"{folder} exists and is not an empty folder"):
            save_diffusers(folder, small_unet.config, small_unet.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_text() == "kept"


def test_a_failed_write_leaves_nothing(small_unet, tmp_path, monkeypatch):
    replace = os.replace

    def fail_at_the_last_file(source, target):
        if os.fspath(target).endswith("model_index.json"):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_last_file)
    with pytest.raises(OSError, match="disk full"):
        save_diffusers(tmp_path / "saved", small_unet.config, small_unet.state_dict())
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_readable_as_the_umask_says(small_unet, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved").chmod(0o711)
    before = os.umask(0o027)
    try:
        save_diffusers(tmp_path / "saved", small_unet.config, small_unet.state_dict())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "saved").stat().st_mode) == 0o711  # somebody's own
    assert stat.S_IMODE((tmp_path / "saved" / "unet").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "saved" / "unet" / WEIGHTS).stat().st_mode) == 0o640


@pytest.mark.slow
def test_diffusers_need_not_be_installed(pipeline, tmp_path):
    code = (
        "import sys; sys.modules['diffusers'] = None; from pathlib import Path; from ddim_fast import UNet; "
        "from ddim_fast.models.formats.diffusers import save_diffusers; model = UNet.from_pretrained(sys.argv[1]); "
        "save_diffusers(Path(sys.argv[2]), model.config, model.state_dict())"
    )
    done = subprocess.run([sys.executable, "-c", code, pipeline, tmp_path / "out"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model_index.json").is_file()
