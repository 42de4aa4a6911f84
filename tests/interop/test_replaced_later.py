"""What is replaced in an accelerated network wins: the result is that of the plain network with the same change."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from ddim_fast import accelerate, unaccelerate
from tests.helpers.small_networks import ATTENTION, BLOCKS, CROSS

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_processor import (  # noqa: E402 - it needs diffusers
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.normalization import RMSNorm  # noqa: E402

from ddim_fast.interop.diffusers_modules import FAST  # noqa: E402

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LATENT = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
DTYPES = pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def for_inference():
    with torch.no_grad():
        yield


def _conv(of: nn.Conv2d, size: int = 3, **options) -> nn.Conv2d:
    """Another one in the place of ``of``, of small weights."""
    torch.manual_seed(5)
    conv = nn.Conv2d(of.in_channels, of.out_channels, size, padding=size // 2, **options)
    return conv.requires_grad_(False)


def _linear(of: nn.Linear, **options) -> nn.Linear:
    torch.manual_seed(6)
    return nn.Linear(of.in_features, of.out_features, **options).requires_grad_(False)


class Doubling(nn.Module):
    """Somebody's layer: what it computes is known to nobody else."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args, **kwargs):
        return 2 * self.inside(*args, **kwargs)


class Smooth(nn.Upsample):
    """An upsampler as a block calls it."""

    def forward(self, x: torch.Tensor, size=None) -> torch.Tensor:
        return super().forward(x)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Negative(nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)


class Halved(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) / 2


def _block(model: nn.Module) -> nn.Module:
    return model.down_blocks[0].resnets[0]


def _shortcut_block(model: nn.Module) -> nn.Module:
    return next(b for b in model.down_blocks[1].resnets if b.conv_shortcut is not None)


def _attention(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, Attention))


def _norm(affine: bool = True, groups: int = 4, channels: int = 16) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, affine=affine).requires_grad_(False)


def _set(get, name: str, value):
    """A change that puts something in the place of a child, or of a number."""

    def change(model: nn.Module) -> None:
        owner = get(model)
        setattr(owner, name, value(getattr(owner, name)) if callable(value) else value)

    return change


def _model(model: nn.Module) -> nn.Module:
    return model


def _upsampler(model: nn.Module) -> nn.Module:
    return model.up_blocks[0].upsamplers[0]


def _dilate(model: nn.Module) -> None:
    conv = _block(model).conv2
    conv.dilation, conv.padding = (2, 2), (2, 2)


def _wrap_last_activation(model: nn.Module) -> None:
    model.conv_act = nn.Sequential(model.conv_act, nn.Tanh())


def _use_activation_twice(model: nn.Module) -> None:
    _block(model).nonlinearity = model.conv_act


def _activate_again(model: nn.Module) -> None:
    model.conv_out = nn.Sequential(model.conv_act, model.conv_out)


def _enlarge(parameter: nn.Parameter) -> None:
    parameter.data.mul_(1.5)


CHANGES = {
    "last activation": _set(_model, "conv_act", lambda _: nn.GELU()),
    "last activation, wrapped": _wrap_last_activation,
    "last activation, in another place as well": _use_activation_twice,
    "last activation, before the convolution as well": _activate_again,
    "last activation, watched": lambda m: m.conv_act.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "last norm": _set(_model, "conv_norm_out", lambda _: _norm()),
    "last norm, another class": _set(_model, "conv_norm_out", lambda n: Negative(8, 16)),
    "activation": _set(_block, "nonlinearity", lambda _: nn.GELU()),
    "activation, wrapped": _set(_block, "nonlinearity", Doubling),
    "norm": _set(_block, "norm1", lambda _: _norm()),
    "norm without parameters": _set(_block, "norm2", lambda _: _norm(affine=False)),
    "norm of another class": _set(_block, "norm1", lambda _: Negative(8, 16)),
    "norm, none": _set(_block, "norm2", lambda _: nn.Identity()),
    "convolution": _set(_block, "conv1", _conv),
    "convolution without a bias": _set(_block, "conv2", lambda c: _conv(c, bias=False)),
    "convolution of one pixel": _set(_block, "conv2", lambda c: _conv(c, 1)),
    "convolution of 5x5": _set(_block, "conv1", lambda c: _conv(c, 5)),
    "convolution, wrapped": _set(_block, "conv1", Doubling),
    "convolution, dilated": _dilate,
    "bias of a convolution": lambda m: setattr(_block(m).conv1, "bias", None),
    "biases of a shortcut": lambda m: [
        setattr(c, "bias", None) for c in (_shortcut_block(m).conv_shortcut, _shortcut_block(m).conv2)
    ],
    "shortcut": _set(_shortcut_block, "conv_shortcut", lambda c: _conv(c, 1)),
    "shortcut of 3x3": _set(_shortcut_block, "conv_shortcut", _conv),
    "shortcut where there was none": _set(_block, "conv_shortcut", lambda _: _conv(nn.Conv2d(16, 16, 1), 1)),
    "dropout": _set(_block, "dropout", Doubling),
    "embedding": _set(_block, "time_emb_proj", _linear),
    "embedding, wrapped": _set(_block, "time_emb_proj", Doubling),
    "embedding, not activated": _set(_block, "skip_time_act", True),
    "scale of the output": _set(_block, "output_scale_factor", 2.0),
    "enlargement in a block": lambda m: setattr(_block(m), "downsample", nn.Sequential(nn.AvgPool2d(3, 1, 1))),
    "first convolution": _set(_model, "conv_in", _conv),
    "last convolution": _set(_model, "conv_out", _conv),
    "upsampling": _set(_upsampler, "conv", lambda c: _conv(c, 5)),
    "upsampling's norm": _set(_upsampler, "norm", lambda _: nn.LayerNorm(32).requires_grad_(False)),
    "upsampler": lambda m: m.up_blocks[0].upsamplers.__setitem__(0, Smooth(scale_factor=2, mode="bilinear")),
    "downsampler": lambda m: m.down_blocks[0].downsamplers.__setitem__(0, _conv(nn.Conv2d(16, 16, 3), stride=2)),
    "block": lambda m: m.mid_block.resnets.__setitem__(0, Doubling(m.mid_block.resnets[0])),
    "new block": lambda m: m.mid_block.resnets.__setitem__(
        0, diffusers.models.resnet.ResnetBlock2D(in_channels=32, temb_channels=64, groups=4)
    ),
    "weight norm": lambda m: _enlarge(parametrizations.weight_norm(_block(m).conv1).parametrizations.weight.original0),
    "parametrization": lambda m: parametrize.register_parametrization(_block(m).conv2, "weight", Doubled()),
    "parametrization of a linear layer": lambda m: parametrize.register_parametrization(
        _attention(m).to_q, "weight", Doubled()
    ),
    "weight norm by a hook": lambda m: _enlarge(nn.utils.weight_norm(_block(m).conv1).weight_g),
    "forward": lambda m: setattr(
        _block(m).conv1, "forward", lambda x: F.conv2d(x.float(), torch.ones(16, 16, 3, 3) / 90, padding=1)
    ),
    "attention's linear layer": _set(_attention, "to_q", _linear),
    "attention's linear layer without a bias": _set(_attention, "to_v", lambda linear: _linear(linear, bias=False)),
    "attention's last layer": lambda m: _attention(m).to_out.__setitem__(0, _linear(_attention(m).to_out[0])),
    "attention's dropout": lambda m: _attention(m).to_out.__setitem__(1, Doubling(nn.Identity())),
    "attention's dropout, then another layer": lambda m: _attention(m).to_out.append(nn.Tanh()),
    "processor": lambda m: _attention(m).set_processor(Halved()),
    "processor and scale": lambda m: (_attention(m).set_processor(AttnProcessor()), setattr(_attention(m), "scale", 2.0)),
    "norm of queries": _set(_attention, "norm_q", lambda _: RMSNorm(8, 1e-5).requires_grad_(False)),
    "residual connection": lambda m: setattr(_attention(m), "residual_connection", not _attention(m).residual_connection),
}
UNET_ALONE = {
    "attention's norm": _set(_attention, "group_norm", lambda _: _norm()),
    "attention's norm, another class": _set(_attention, "group_norm", lambda _: Negative(8, 16)),
}
CONDITIONAL = {
    "transformer's norm": lambda m: setattr(m.mid_block.attentions[0], "norm", _norm(channels=32)),
    "transformer's projection": lambda m: setattr(
        m.mid_block.attentions[0], "proj_in", _conv(m.mid_block.attentions[0].proj_in, 1)
    ),
    "feed forward": lambda m: (
        m.mid_block.attentions[0]
        .transformer_blocks[0]
        .ff.net.__setitem__(2, _linear(m.mid_block.attentions[0].transformer_blocks[0].ff.net[2]))
    ),
    "layer norm": lambda m: setattr(
        m.mid_block.attentions[0].transformer_blocks[0], "norm1", nn.LayerNorm(32, elementwise_affine=False)
    ),
}


MADE: dict[bool, nn.Module] = {}

# What computes the same, if nothing is computed twice.
SAME = {"last activation, in another place as well", "attention's dropout, then another layer"}


@pytest.fixture
def network(randomise):
    def network(conditional: bool = False) -> nn.Module:
        if conditional not in MADE:
            torch.manual_seed(0)
            kind, options = (diffusers.UNet2DConditionModel, CROSS) if conditional else (diffusers.UNet2DModel, ATTENTION)
            MADE[conditional] = randomise(kind(**BLOCKS, **options)).requires_grad_(False)
        return copy.deepcopy(MADE[conditional])

    return network


def call(model: nn.Module) -> torch.Tensor:
    conditional = isinstance(getattr(model, "_orig_mod", model), diffusers.UNet2DConditionModel)
    return model(LATENT, 5, TEXT).sample if conditional else model(X, 5).sample


def changed(model: nn.Module, change) -> nn.Module:
    torch.manual_seed(9)
    change(model)
    return model.requires_grad_(False).eval()


def close(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None) -> None:
    error = (result - expected).float().square().mean().sqrt() / expected.float().square().mean().sqrt()
    assert result.dtype == expected.dtype and error < (1e-5 if dtype is None else 4e-2), float(error)


def accelerated(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    accelerate(model, dtype=dtype)
    call(model)
    return model


@pytest.mark.parametrize(
    ("conditional", "name"),
    [(False, name) for name in CHANGES | UNET_ALONE] + [(True, name) for name in CONDITIONAL],
)
def test_the_change_wins(network, conditional, name):
    change = (CHANGES | UNET_ALONE | CONDITIONAL)[name]
    before, expected = call(network(conditional)), call(changed(network(conditional), change))
    assert torch.allclose(expected, before, rtol=1e-3, atol=1e-4) == (name in SAME)
    for dtype in (None, torch.bfloat16):
        model = accelerated(network(conditional), dtype)
        changed(model, change)
        close(call(model), expected, dtype)
        close(call(model), expected, dtype)
        # And so it does where it was there before.
        close(call(accelerated(changed(network(conditional), change), dtype)), expected, dtype)
        unaccelerate(model)
        assert torch.equal(call(model), expected)
        assert not any(
            issubclass(type(module), tuple(FAST)) or any("_fast" in key for key in vars(module)) for module in model.modules()
        )


class WithWeights(AttnProcessor2_0):
    """A processor that is no module, and keeps a layer of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = {"before": nn.Linear(width, width).requires_grad_(False)}

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return super().__call__(attn, self.layers["before"](hidden_states), *args, **kwargs)


class LoRA(nn.Module):
    """A processor with weights of its own beside those of the projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.down, self.up = nn.Linear(width, 4), nn.Parameter(torch.randn(width, 4) / 4)
        self.requires_grad_(False)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        others = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_q(hidden_states) + self.down(hidden_states) @ self.up.t()
        heads = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, attn.to_k(others), attn.to_v(others)))
        out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def _adapters(model: nn.Module) -> None:
    """Picture prompts, as pipelines load them."""
    torch.manual_seed(10)
    for block in model.modules():
        if isinstance(block, Attention) and block.to_k.in_features == 24:
            block.set_processor(IPAdapterAttnProcessor2_0(block.to_q.in_features, 24, num_tokens=(3,)))


def _foreign(kind: type):
    def change(model: nn.Module) -> None:
        for block in model.modules():
            if isinstance(block, Attention) and block.to_k.in_features == block.to_q.in_features:
                block.set_processor(kind(block.to_q.in_features))

    return change


def _sliced_and_parametrized(model: nn.Module) -> None:
    model.set_attn_processor(AttnProcessor2_0())
    model.set_attention_slice(1)
    parametrize.register_parametrization(_attention(model).to_q, "weight", Doubled())


PROCESSORS = {
    "IP adapter": _adapters,
    "LoRA": _foreign(LoRA),
    "no module": _foreign(WithWeights),
    "other parts that stay": _sliced_and_parametrized,
}


@DTYPES
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_with_weights_of_their_own(network, name, dtype):
    change = PROCESSORS[name]
    pictures = [torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(3))]

    def call(model: nn.Module) -> torch.Tensor:
        text = (TEXT, pictures) if name == "IP adapter" else TEXT
        return model(LATENT, 5, text).sample

    expected = call(changed(network(True), change))
    later = network(True)
    accelerate(later, dtype=dtype)
    later(LATENT, 5, TEXT)
    changed(later, change)
    before = changed(network(True), change)
    accelerate(before, dtype=dtype)
    for model in (later, before):
        close(call(model), expected, dtype)
        assert torch.equal(call(unaccelerate(model)), expected)


def test_a_copy_looks_after_itself(network):
    model = accelerated(network(), torch.bfloat16)
    other = copy.deepcopy(model)
    before = call(model)
    changed(other, CHANGES["convolution"])
    close(call(other), call(changed(network(), CHANGES["convolution"])), torch.bfloat16)
    assert torch.equal(call(model), before)
    unaccelerate(model)
    close(call(other), call(changed(network(), CHANGES["convolution"])), torch.bfloat16)
    assert torch.equal(call(unaccelerate(other)), call(changed(network(), CHANGES["convolution"])))


@DTYPES
def test_what_was_taken_out_is_given_back_too(network, dtype):
    model = accelerated(network(), dtype)
    block, conv, attention = model.mid_block.resnets[0], model.conv_in, model.mid_block.attentions[0]
    model.mid_block.resnets[0], model.conv_in, model.mid_block.attentions[0] = nn.Identity(), _conv(conv), nn.Identity()
    unaccelerate(model)
    model.mid_block.resnets[0], model.conv_in, model.mid_block.attentions[0] = block, conv, attention
    assert torch.equal(call(model), call(network()))


@pytest.mark.slow
@DTYPES
def test_compiled_networks_too(network, dtype):
    model = network()
    accelerate(model, dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    call(compiled)
    expected = network()
    for name in ("convolution", "last activation"):
        changed(model, CHANGES[name])
        changed(expected, CHANGES[name])
    if dtype is not None:
        accelerate(model, dtype=dtype)
    close(call(compiled), call(expected), dtype)


@DTYPES
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_layerwise_casting_from_before(network, storage, dtype):
    def cast(model: nn.Module) -> nn.Module:
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        return model

    model = cast(network())
    report = accelerate(model, dtype=dtype)
    assert not report.replaced and "layerwise casting" in report.left_alone[0].why
    expected = call(cast(network()))
    assert torch.equal(call(model), expected) and torch.equal(call(unaccelerate(model)), expected)


@DTYPES
def test_networks_without_biases_and_norms_without_parameters(network, dtype):
    def bare(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.bias = None
            elif isinstance(module, nn.GroupNorm):
                module.weight = module.bias = None
        return model

    expected = call(bare(network()))
    model = bare(network())
    report = accelerate(model, dtype=dtype)
    assert not report.left_alone
    close(call(model), expected, dtype)
    close(call(bare(accelerated(network(), dtype))), expected, dtype)


@DTYPES
def test_a_parametrization_can_be_removed_afterwards(network, dtype):
    model = accelerated(network(), dtype)
    conv = model.mid_block.resnets[0].conv1
    parametrizations.weight_norm(conv)
    call(model)
    unaccelerate(model)
    assert type(conv).__name__ == "ParametrizedConv2d" and isinstance(conv, nn.Conv2d)
    parametrize.remove_parametrizations(conv, "weight")
    assert type(conv) is nn.Conv2d
    torch.testing.assert_close(call(model), call(network()), rtol=1e-4, atol=1e-5)
