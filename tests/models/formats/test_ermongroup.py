"""Checkpoints of the DDIM authors' code, against a restatement of their network by its tensors' names."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ddim_fast import UNet, UNetConfig

CHANNELS, MULTIPLIERS, BLOCKS, ATTENDING = 32, (1, 2, 3), 2, 1
CONFIG = UNetConfig(sample_size=32, base_channels=CHANNELS, channel_multipliers=MULTIPLIERS)


def make_tensors(multipliers=MULTIPLIERS, blocks=BLOCKS, attending=(ATTENDING,), channels=3):
    """A network of their code with random weights: tensors by name, in their order."""
    torch.manual_seed(0)
    widths = [CHANNELS * m for m in multipliers]
    tensors = {}

    def layer(name, *shape):
        tensors[f"{name}.weight"] = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
        tensors[f"{name}.bias"] = 0.2 * torch.randn(shape[0])

    def norm(name, width):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + 0.2 * torch.randn(width), 0.2 * torch.randn(width)

    def block(name, width_in, width):
        norm(f"{name}.norm1", width_in)
        layer(f"{name}.conv1", width, width_in, 3, 3)
        layer(f"{name}.temb_proj", width, 4 * CHANNELS)
        norm(f"{name}.norm2", width)
        layer(f"{name}.conv2", width, width, 3, 3)
        if width_in != width:
            layer(f"{name}.nin_shortcut", width, width_in, 1, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    layer("temb.dense.0", 4 * CHANNELS, CHANNELS)
    layer("temb.dense.1", 4 * CHANNELS, 4 * CHANNELS)
    layer("conv_in", CHANNELS, channels, 3, 3)
    skips, width = [CHANNELS], CHANNELS
    for i, wide in enumerate(widths):
        for j in range(blocks):
            block(f"down.{i}.block.{j}", width, wide)
            if i in attending:
                attention(f"down.{i}.attn.{j}", wide)
            width = wide
            skips.append(width)
        if i < len(widths) - 1:
            layer(f"down.{i}.downsample.conv", width, width, 3, 3)
            skips.append(width)
    block("mid.block_1", width, width)
    attention("mid.attn_1", width)
    block("mid.block_2", width, width)
    for i, wide in reversed(list(enumerate(widths))):
        for j in range(blocks + 1):
            block(f"up.{i}.block.{j}", width + skips.pop(), wide)
            if i in attending:
                attention(f"up.{i}.attn.{j}", wide)
            width = wide
        if i:
            layer(f"up.{i}.upsample.conv", width, width, 3, 3)
    norm("norm_out", width)
    layer("conv_out", channels, width, 3, 3)
    return tensors


def evaluate(tensors, x, t):
    """Their network: eps(x, t)."""

    def parameters(name):
        return tensors[f"{name}.weight"], tensors[f"{name}.bias"]

    def norm(name, h):
        return F.group_norm(h, 32, *parameters(name), eps=1e-6)

    def block(name, h, temb):
        y = F.conv2d(F.silu(norm(f"{name}.norm1", h)), *parameters(f"{name}.conv1"), padding=1)
        y = y + F.linear(F.silu(temb), *parameters(f"{name}.temb_proj"))[:, :, None, None]
        y = F.conv2d(F.silu(norm(f"{name}.norm2", y)), *parameters(f"{name}.conv2"), padding=1)
        has_shortcut = f"{name}.nin_shortcut.weight" in tensors
        return y + (F.conv2d(h, *parameters(f"{name}.nin_shortcut")) if has_shortcut else h)

    def attention(name, h):
        if f"{name}.q.weight" not in tensors:
            return h
        y = norm(f"{name}.norm", h)
        q, k, v = (F.conv2d(y, *parameters(f"{name}.{part}")).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("nci,ncj->nij", q, k) / math.sqrt(q.shape[1]), dim=2)
        y = torch.einsum("nij,ncj->nci", weights, v).view_as(h)
        return h + F.conv2d(y, *parameters(f"{name}.proj_out"))

    half = CHANNELS // 2
    angles = t.float()[:, None] * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    temb = F.linear(torch.cat([angles.sin(), angles.cos()], dim=1), *parameters("temb.dense.0"))
    temb = F.linear(F.silu(temb), *parameters("temb.dense.1"))

    skips = [F.conv2d(x, *parameters("conv_in"), padding=1)]
    levels = len({name.split(".")[1] for name in tensors if name.startswith("down.")})
    blocks = len({name.split(".")[3] for name in tensors if name.startswith("down.0.block.")})
    for i in range(levels):
        for j in range(blocks):
            skips.append(attention(f"down.{i}.attn.{j}", block(f"down.{i}.block.{j}", skips[-1], temb)))
        if i < levels - 1:
            skips.append(F.conv2d(F.pad(skips[-1], (0, 1, 0, 1)), *parameters(f"down.{i}.downsample.conv"), stride=2))
    h = block("mid.block_2", attention("mid.attn_1", block("mid.block_1", skips[-1], temb)), temb)
    for i in reversed(range(levels)):
        for j in range(blocks + 1):
            h = block(f"up.{i}.block.{j}", torch.cat([h, skips.pop()], dim=1), temb)
            h = attention(f"up.{i}.attn.{j}", h)
        if i:
            h = F.conv2d(F.interpolate(h, scale_factor=2.0), *parameters(f"up.{i}.upsample.conv"), padding=1)
    return F.conv2d(F.silu(norm("norm_out", h)), *parameters("conv_out"), padding=1)


@pytest.fixture(scope="module")
def tensors():
    return make_tensors()


@pytest.fixture
def save(tmp_path):
    """A function that writes a checkpoint file."""

    def save(content, name="model-790000.ckpt", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


def change(tensors, by=1.0):
    return {name: tensor + by for name, tensor in tensors.items()}


def assert_holds(model, tensors):
    """``model`` has exactly the weights ``tensors``."""
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in tensors.values())
    values = {tuple(t.flatten()[:4].tolist()) for t in tensors.values()}
    for name, p in model.named_parameters():
        assert tuple(p.flatten()[:4].tolist()) in values, name


@torch.no_grad()
def test_the_network_is_theirs(tensors, save):
    model = UNet.from_pretrained(save(tensors))
    assert model.config == CONFIG
    assert_holds(model, tensors)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 871])
    expected = evaluate(tensors, x, t)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(x, t), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "shape",
    [
        {"multipliers": (1, 2, 2, 2), "attending": (1,)},
        {"multipliers": (1, 1, 2), "attending": (2,), "blocks": 1},
        {"multipliers": (1,), "attending": (0,), "channels": 1},
    ],
    ids=str,
)
def test_the_configuration_is_derived_from_the_shapes(shape, save):
    tensors = make_tensors(**shape)
    model = UNet.from_pretrained(save(tensors))
    assert model.config == UNetConfig(
        sample_size=16 * 2 ** shape["attending"][0],
        in_channels=shape.get("channels", 3),
        base_channels=CHANNELS,
        channel_multipliers=shape["multipliers"],
        layers_per_block=shape.get("blocks", 2),
    )
    x, t = torch.randn(1, *model.config.image_shape), torch.tensor([500])
    torch.testing.assert_close(model(x, t), evaluate(tensors, x, t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name,multipliers,attending",
    [("cifar10-128", (1, 2, 2, 2), 1), ("celeba-64", (1, 2, 2, 2, 4), 2), ("celebahq-256", (1, 1, 2, 2, 4, 4), 4)],
)
def test_the_published_networks_are_the_presets(name, multipliers, attending, save):
    """cifar10.yml, celeba.yml, and bedroom.yml and church.yml, with narrower levels. Their files do not tell the dropout."""
    model = UNet.from_pretrained(save(make_tensors(multipliers, attending=(attending,))))
    assert model.config == UNetConfig.preset(name, base_channels=CHANNELS, dropout=0.1)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_of_a_training_checkpoint_the_ema_is_taken(options, tensors, save):
    trained = {f"module.{name}": tensor for name, tensor in change(tensors).items()}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    model = UNet.from_pretrained(save([trained, optimizer, 7, 5000, tensors], **options))
    assert_holds(model, tensors)


@pytest.mark.parametrize("rest", [[], [{"state": {}, "param_groups": []}, 7, 5000], [{}, 7, 5000, {}]], ids=str)
def test_without_an_ema_the_network_itself_is_taken(rest, tensors, save):
    model = UNet.from_pretrained(save([{f"module.{name}": tensor for name, tensor in tensors.items()}, *rest]))
    assert_holds(model, tensors)


def test_the_file_may_be_safetensors(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    assert_holds(UNet.from_pretrained(tmp_path / "model.safetensors"), tensors)


def test_a_given_configuration_is_used(tensors, save):
    config = UNetConfig.from_dict({**CONFIG.to_dict(), "sample_size": 64, "attention_resolutions": [32], "beta_end": 0.01})
    assert UNet.from_pretrained(save(tensors), config=config).config == config
    with pytest.raises(
        ValueError, match=r"790000\.ckpt: tensor 'conv_in\.weight' has shape \(32, 3, 3, 3\), .* \(64, 3, 3, 3\)"
    ):
        UNet.from_pretrained(
            save(tensors), config=UNetConfig(sample_size=32, base_channels=64, channel_multipliers=MULTIPLIERS)
        )


@pytest.mark.parametrize("attending", [(), (1, 2)])
def test_an_image_size_that_cannot_be_told_has_to_be_given(attending, save):
    path = save(make_tensors(attending=attending))
    with pytest.raises(ValueError, match=rf"790000\.ckpt: .* attention at {len(attending)} levels; load it with .*config="):
        UNet.from_pretrained(path)
    config = UNetConfig.from_dict({**CONFIG.to_dict(), "attention_resolutions": [32 >> i for i in attending]})
    assert UNet.from_pretrained(path, config=config).config == config


def _remove(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    "damage,message",
    [
        (_remove("conv_out.bias"), "missing tensor 'conv_out.bias'"),
        (_remove("conv_in.weight"), "missing tensor 'conv_in.weight'"),
        (_remove("down.1.block.0.conv1.weight"), "missing tensor 'down.1.block.0.conv1.weight'"),
        (_remove("down.0.block.1.norm1.bias"), "missing tensor 'down.0.block.1.norm1.bias'"),
        (_remove("mid.attn_1.proj_out.weight"), "missing tensor 'mid.attn_1.proj_out.weight'"),
        (_remove("up.2.block.2.nin_shortcut.bias"), "missing tensor 'up.2.block.2.nin_shortcut.bias'"),
        (_remove("temb.dense.1.weight"), "missing tensor 'temb.dense.1.weight'"),
        (lambda t: t.update(logvar=torch.zeros(1000)), "unexpected tensor 'logvar'"),
        (lambda t: t.update({"down.9999999999.x": torch.zeros(1)}), "missing tensor 'down.3.block.0.conv1.weight'"),
        (
            lambda t: t.update({"conv_in.weight": torch.zeros(9)}),
            "'conv_in.weight' has shape (9,), not the shape of a convolution",
        ),
        (
            lambda t: t.update({"conv_in.weight": torch.zeros(0, 3, 3, 3)}),
            "'conv_in.weight' has shape (0, 3, 3, 3), not the shape of a convolution",
        ),
        (
            lambda t: t.update({"conv_in.weight": torch.zeros(64, 3, 3, 3)}),
            "levels of [32, 64, 96] channels: the first must have the 64 of conv_in",
        ),
        (
            lambda t: t.update({"up.0.block.2.conv2.weight": torch.zeros(32, 32, 1, 1)}),
            "tensor 'up.0.block.2.conv2.weight' has shape (32, 32, 1, 1), the network needs (32, 32, 3, 3)",
        ),
        (
            lambda t: t.update({"mid.attn_1.q.weight": torch.zeros(96, 96, 3, 3)}),
            "tensor 'mid.attn_1.q.weight' has shape (96, 96, 3, 3), the network needs (96, 96)",
        ),
        (
            lambda t: t.update({"conv_out.bias": torch.zeros(3, dtype=torch.int64)}),
            "tensor 'conv_out.bias' is not a dense array of floating-point numbers",
        ),
        (
            lambda t: t.update({"mid.attn_1.q.weight": torch.full((96, 96, 1, 1), math.nan)}),
            "tensor 'mid.attn_1.q.weight' is not finite",
        ),
        (
            lambda t: t.update({"mid.attn_1.q.weight": torch.zeros(96, 96, 1, 1).to_sparse()}),
            "tensor 'mid.attn_1.q.weight' is not a dense array of floating-point numbers",
        ),
        (
            lambda t: t.update({"conv_out.bias": torch.empty(3, device="meta")}),
            "tensor 'conv_out.bias' is not a dense array of floating-point numbers",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_network_is_named_by_file_and_tensor(damage, message, tensors, save):
    damaged = dict(tensors)
    damage(damaged)
    path = save(damaged)
    with pytest.raises(ValueError) as caught:
        UNet.from_pretrained(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


@pytest.mark.parametrize(
    "content,message",
    [
        (3, "neither a network's tensors by name nor a list that begins with them"),
        ([], "neither a network's"),
        ({}, "neither a network's"),
        ([7, 5000], "neither a network's"),
        ({"step": 3, "model": {}}, "neither a network's"),
        ({3: torch.zeros(1)}, "neither a network's"),
        ({"time_embedding.linear_1.weight": torch.zeros(1)}, "give the folder"),
        ({"x": torch.zeros(1)}, "missing tensor 'conv_in.weight'"),
        ({"conv_in.weight": torch.zeros(32, 3, 3, 3)}, "missing tensor 'down.0.block.0.conv1.weight'"),
    ],
    ids=str,
)
def test_what_is_no_network_is_named_by_file(content, message, save):
    path = save(content)
    with pytest.raises(ValueError) as caught:
        UNet.from_pretrained(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_code_in_a_file_is_not_executed(pickle_with_code, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle_with_code)
    with pytest.raises(ValueError, match=r"model\.ckpt: it holds \S*open, which is not data and was not executed$"):
        UNet.from_pretrained(path)


def test_a_module_is_not_data(save):
    with pytest.raises(ValueError, match=r"790000\.ckpt: it holds torch\.nn\.modules\.linear\.Linear, which is not data"):
        UNet.from_pretrained(save(torch.nn.Linear(2, 2)))


def test_a_file_that_is_not_whole_is_named(damaged_pickle, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(damaged_pickle)
    with pytest.raises(ValueError, match=r"model\.ckpt: not a whole file of tensors; copy or download it again$"):
        UNet.from_pretrained(path)
