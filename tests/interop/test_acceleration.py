"""accelerate() and unaccelerate() on diffusers' networks and pipelines."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import nn

import ddim_fast
from ddim_fast import UNet, UNetConfig, accelerate, unaccelerate
from tests.helpers.small_networks import ATTENTION, BLOCKS, CROSS

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0  # noqa: E402 - it needs diffusers

from ddim_fast.interop.acceleration import refresh  # noqa: E402
from ddim_fast.interop.diffusers import FastDDIMInverseScheduler, FastDDIMScheduler  # noqa: E402
from ddim_fast.interop.diffusers_modules import FastAttnProcessor, FastConv2d, FastResnetBlock2D  # noqa: E402

DENOISERS = {
    "unet": lambda: diffusers.UNet2DModel(**BLOCKS, **ATTENTION),
    "as published": lambda: diffusers.UNet2DModel(
        **BLOCKS,
        **ATTENTION,
        attention_head_dim=None,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    ),
    "one channel": lambda: diffusers.UNet2DModel(**BLOCKS, **ATTENTION, in_channels=1, out_channels=1),
    "scale and shift": lambda: diffusers.UNet2DModel(
        **BLOCKS, **ATTENTION, resnet_time_scale_shift="scale_shift", mid_block_scale_factor=1.4
    ),
    "resampled inside": lambda: diffusers.UNet2DModel(
        **BLOCKS,
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
    ),
    "skip branch": lambda: diffusers.UNet2DModel(
        **BLOCKS | {"block_out_channels": (32, 64)},
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    ),
    "classes": lambda: diffusers.UNet2DModel(**BLOCKS, **ATTENTION, num_class_embeds=4),
    "conditional": lambda: diffusers.UNet2DConditionModel(**BLOCKS, **CROSS),
    "conditional, linear": lambda: diffusers.UNet2DConditionModel(
        **BLOCKS, **CROSS, use_linear_projection=True, resnet_time_scale_shift="scale_shift"
    ),
}


@pytest.fixture
def make(randomise):
    """Makes a network by its name in DENOISERS, and a call of it."""

    def make(name: str):
        torch.manual_seed(0)
        model = randomise(DENOISERS[name]()).requires_grad_(False)
        return model, lambda m: evaluate(m)

    return make


def evaluate(model: nn.Module, dtype: torch.dtype | None = None, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    dtype = dtype or model.dtype
    x = torch.randn(2, model.config.in_channels, *size, generator=generator).to(dtype)
    inputs = [x, torch.tensor(321)]
    if isinstance(getattr(model, "_orig_mod", model), diffusers.UNet2DConditionModel):
        inputs.append(torch.randn(2, 5, 24, generator=generator).to(dtype))
    elif model.config.num_class_embeds is not None:
        inputs.append(torch.tensor([1, 3]))
    return model(*inputs).sample


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.detach().double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def in_dtype(model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The network's plain result in a dtype."""
    return evaluate(copy.deepcopy(model).to(dtype))


def places(model: nn.Module) -> dict:
    """Everything that accelerate may change, by name."""
    state = {}
    for name, module in model.named_modules():
        others = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        own = {n: (p, p._version, p.data_ptr(), p.stride(), p.dtype) for n, p in module.named_parameters(recurse=False)}
        state[name] = (module, type(module), others | {"_forward_pre_hooks": dict(module._forward_pre_hooks)}, own)
    return state


def assert_same_places(after: dict, before: dict) -> None:
    assert after.keys() == before.keys()
    for name, (module, kind, others, own) in before.items():
        assert after[name][0] is module and after[name][1] is kind, name
        assert after[name][2].keys() == others.keys() and all(
            after[name][2][key] is value for key, value in others.items() if not isinstance(value, dict)
        ), name
        assert len(after[name][2]["_forward_pre_hooks"]) == len(others["_forward_pre_hooks"])
        assert after[name][3].keys() == own.keys()
        for key, (parameter, *rest) in own.items():
            assert after[name][3][key][0] is parameter and list(after[name][3][key][1:]) == rest, name


class TestTheSameResult:
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", DENOISERS)
    def test_in_eager(self, make, name, dtype):
        model, call = make(name)
        exact, plain = in_dtype(model, torch.float64), in_dtype(model, dtype or torch.float32)
        report = accelerate(model, dtype=dtype)
        result = call(model)
        assert result.dtype == torch.float32 and result.is_contiguous()
        assert error(result, exact) <= 2 * error(plain, exact)
        assert len(report.replaced) > 30 and any(r.by == "group_norm_silu, conv3x3" for r in report.replaced)

    @pytest.mark.slow
    def test_compiled(self, make):
        model, call = make("conditional")
        exact, plain = in_dtype(model, torch.float64), in_dtype(model, torch.bfloat16)
        accelerate(model, dtype=torch.bfloat16)
        compiled = torch.compile(model, fullgraph=True)
        assert error(call(compiled), exact) <= 2 * error(plain, exact)
        with torch.no_grad():  # the weights are not constants of what was compiled
            model.mid_block.resnets[0].conv1.weight.mul_(3)
        changed = call(compiled)
        assert error(changed, call(copy.deepcopy(model)).double()) < 2e-2 < error(changed, exact)

    @pytest.mark.slow
    def test_by_the_engine(self, make):
        model, call = make("unet")
        plain = call(model)
        assert accelerate(model, engine="compiled").engine == "compiled"
        torch.testing.assert_close(call(model), plain, rtol=1e-4, atol=1e-5)
        assert model._compiled_call_impl is not None
        unaccelerate(model)
        assert model._compiled_call_impl is None and torch.equal(call(model), plain)

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    def test_of_a_network_that_is_in_bfloat16_itself(self, make, dtype):
        model, call = make("conditional")
        exact = in_dtype(model, torch.float64)
        model.to(torch.bfloat16)
        plain = call(model)
        accelerate(model, dtype=dtype)
        result = call(model)
        assert result.dtype == torch.bfloat16 and error(result, exact) <= 2 * error(plain, exact)

    def test_of_sizes_that_halves_do_not_fit(self, make):
        """The upsampling is told its size."""
        model, _ = make("conditional")
        plain = evaluate(model, size=(7, 11))
        accelerate(model)
        torch.testing.assert_close(evaluate(model, size=(7, 11)), plain, rtol=1e-4, atol=1e-5)

    def test_with_an_attention_mask(self, make):
        model, _ = make("conditional")
        mask = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 0, 0]])
        inputs = torch.randn(2, 4, 8, 8), 7, torch.randn(2, 5, 24)
        plain = model(*inputs, encoder_attention_mask=mask).sample
        accelerate(model)
        result = model(*inputs, encoder_attention_mask=mask).sample
        torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(*inputs).sample, plain, atol=1e-3)

    def test_of_an_autoencoder(self, randomise):
        torch.manual_seed(0)
        vae = randomise(
            diffusers.AutoencoderKL(
                block_out_channels=(16, 32),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=8,
            )
        ).requires_grad_(False)
        x = torch.randn(2, 3, 16, 16)

        def call():
            latent = vae.encode(x).latent_dist.mean
            return latent, vae.decode(latent).sample

        plain = call()
        report = accelerate(vae, dtype=torch.bfloat16)  # for denoisers; its own digits stay
        for result, expected in zip(call(), plain, strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        assert {r.kind for r in report.replaced} >= {
            "ResnetBlock2D",
            "Attention",
            "Upsample2D",
            "SiLU",
        } and not report.left_alone
        unaccelerate(vae)
        assert all(torch.equal(result, expected) for result, expected in zip(call(), plain, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_first_calls_of_several_threads(make, dtype, monkeypatch):
    """Each weight is prepared once, and what the threads see is what one alone does."""
    from ddim_fast.ops import conv3x3

    prepared, prepare = Counter(), conv3x3.prepare_conv3x3

    def counting(weight, *args, **options):
        prepared[weight.data_ptr(), str(args), str(options)] += 1
        return prepare(weight, *args, **options)

    monkeypatch.setattr(conv3x3, "prepare_conv3x3", counting)
    model, call = make("unet")
    accelerate(model, dtype=dtype)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                prepared.clear()
                accelerate(model, dtype=dtype)  # once more: what was made of the weights is forgotten
                results = list(pool.map(lambda _: call(model), range(4)))
                assert set(prepared.values()) == {1}
                assert all(torch.equal(result, results[0]) for result in results)
    finally:
        sys.setswitchinterval(interval)
    assert torch.equal(results[0], call(model))


class TestReversible:
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", ["scale and shift", "conditional"])
    def test_unaccelerated_is_the_original_bit_for_bit(self, make, name, dtype):
        model, call = make(name)
        plain, before = call(model), places(model)
        accelerate(model, dtype=dtype)
        assert not torch.equal(call(model), plain)
        assert unaccelerate(model) is model
        assert_same_places(places(model), before)
        assert torch.equal(call(model), plain)

    def test_parameters_are_those_of_before(self, make):
        model, call = make("conditional")
        parameters, state = dict(model.named_parameters()), {k: v.clone() for k, v in model.state_dict().items()}
        accelerate(model, dtype=torch.bfloat16)
        call(model)
        after = dict(model.named_parameters())
        assert after.keys() == parameters.keys() and all(after[name] is p for name, p in parameters.items())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert model.dtype == torch.float32 and type(model) is diffusers.UNet2DConditionModel

    def test_saved_and_loaded(self, make, tmp_path):
        model, call = make("unet")
        plain = call(model)
        model.save_pretrained(tmp_path / "before")
        accelerate(model, dtype=torch.bfloat16)
        fast = call(model)
        model.save_pretrained(tmp_path / "after")
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            before, after = ((tmp_path / folder / name).read_bytes() for folder in ("before", "after"))
            assert before.replace(b"before", b"after") == after
        loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / "after").requires_grad_(False)
        assert torch.equal(call(loaded), plain)
        accelerate(loaded, dtype=torch.bfloat16)
        assert torch.equal(call(loaded), fast)

    def test_twice_counts_once(self, make):
        model, call = make("unet")
        plain, before = call(model), places(model)
        accelerate(model)
        expected = call(model)
        accelerate(model, dtype=torch.bfloat16, engine="compiled")
        accelerate(model)
        assert torch.equal(call(model), expected)
        unaccelerate(model)
        unaccelerate(model)
        assert_same_places(places(model), before)
        assert torch.equal(call(model), plain)

    def test_a_copy_is_accelerated_on_its_own(self, make):
        model, call = make("unet")
        plain = call(model)
        accelerate(model)
        fast = call(model)
        other = copy.deepcopy(model)
        assert torch.equal(call(other), fast)
        unaccelerate(model)
        assert torch.equal(call(other), fast) and torch.equal(call(unaccelerate(other)), plain)

    def test_no_class_is_touched(self, make):
        model, _ = make("unet")
        kinds = {type(module) for module in model.modules()} | {AttnProcessor2_0}
        before = {kind: dict(vars(kind)) for kind in kinds}
        accelerate(model)
        assert {kind: dict(vars(kind)) for kind in kinds} == before


class TestChangesAreSeen:
    """What was made of the weights is never used for others."""

    CHANGES: ClassVar = {
        "in place": lambda p: p.mul_(2),
        "copied": lambda p: p.copy_(p * 2),
        "other data": lambda p: setattr(p, "data", p.data * 2),
        "part": lambda p: p[:1].add_(1),
    }

    @pytest.mark.parametrize("change", CHANGES)
    def test_of_weights(self, make, change):
        model, call = make("conditional")
        accelerate(model, dtype=torch.bfloat16)
        call(model)
        with torch.no_grad():
            for parameter in model.parameters():
                self.CHANGES[change](parameter)
        changed = call(model)
        fresh = copy.deepcopy(unaccelerate(model))
        accelerate(fresh, dtype=torch.bfloat16)
        assert torch.equal(changed, call(fresh))

    def test_writes_through_data_need_a_refresh(self, make):
        """As those of ``fuse_lora`` and of an EMA's ``copy_to``: PyTorch does not count them."""
        model, call = make("conditional")
        accelerate(model, dtype=torch.bfloat16)
        before = call(model)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(1.5)
        refresh(model)
        changed = call(model)
        fresh = copy.deepcopy(unaccelerate(model))
        accelerate(fresh, dtype=torch.bfloat16)
        assert torch.equal(changed, call(fresh)) and not torch.equal(changed, before)

    def test_of_a_loaded_state(self, make):
        model, call = make("unet")
        other, _ = make("unet")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.01)
        accelerate(model)
        call(model)
        model.load_state_dict(other.state_dict())
        accelerate(other)
        assert torch.equal(call(model), call(other))

    def test_of_dtype(self, make):
        model, call = make("unet")
        exact = in_dtype(model, torch.float64)
        accelerate(model)
        call(model)
        model.to(torch.bfloat16)
        result = call(model)
        assert result.dtype == torch.bfloat16 and 1e-4 < error(result, exact) < 3e-2

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    def test_training_goes_on_as_without(self, make, dtype):
        """Gradients and updated weights are those of the plain network, to the last bit; what comes after is seen."""
        model, call = make("conditional")
        plain = copy.deepcopy(model)
        accelerate(model, dtype=dtype)
        with torch.no_grad():
            call(model)
        for m in (model, plain):
            m.train().requires_grad_(True)
            call(m).square().mean().backward()
            torch.optim.SGD(m.parameters(), 0.1).step()
        gradients = [[p.grad for p in m.parameters()] for m in (model, plain)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        with torch.no_grad():
            result = call(model.eval())
            unaccelerate(model)
            assert torch.equal(call(model), call(plain.eval()))
            assert error(result, call(plain).double()) < (1e-5 if dtype is None else 3e-2)

    def test_of_hooks_set_later(self, make):
        model, call = make("unet")
        accelerate(model)
        expected = call(model)
        seen = []
        block = model.mid_block.resnets[0]
        for child in (block.norm1, block.conv2, block):
            child.register_forward_hook(lambda module, args, output: seen.append(module))
        torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-5)
        assert seen == [block.norm1, block.conv2, block]

    def test_of_a_processor_set_later(self, make):
        model, call = make("conditional")
        accelerate(model)
        expected = call(model)
        processor = AttnProcessor()
        model.set_attn_processor(processor)
        torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-5)
        unaccelerate(model)
        assert set(model.attn_processors.values()) == {processor}


class LoRA(nn.Module):
    """A layer with two thin ones beside it, as adapters wrap it."""

    def __init__(self, base_layer: nn.Module, make_thin) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = make_thin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        return result + self.up(self.down(x.to(self.down.weight.dtype))).to(result.dtype)


class MadeAlike(nn.Module):
    """Adapters that are of the class of the layer they stand beside, as peft makes them."""

    def __init__(self, base_layer: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.thin = type(base_layer)(base_layer.in_channels, base_layer.out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.thin(x.to(self.thin.weight.dtype))


def wrap(model: nn.Module) -> list[nn.Module]:
    """Wraps a linear layer and a convolution of a conditional network."""
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    resnet = model.mid_block.resnets[0]
    attention.to_q = LoRA(attention.to_q, lambda: (nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)))
    resnet.conv1 = LoRA(resnet.conv1, lambda: (nn.Conv2d(32, 2, 3, padding=1), nn.Conv2d(2, 32, 1)))
    return [attention.to_q, resnet.conv1]


class OwnConv(nn.Conv2d):
    """A subclass, about which nothing is known."""


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _subclass(block) -> str:
    block.conv2.__class__ = OwnConv
    return "mid_block.resnets.0.conv2"


def _parametrized(block) -> str:
    nn.utils.parametrize.register_parametrization(block.conv2, "weight", Doubled())
    return "mid_block.resnets.0.conv2"


def _quantised(block) -> str:
    conv = block.conv2
    weight = conv.weight.detach()
    conv.weight = nn.Parameter((weight * 50).round().to(torch.int8), requires_grad=False)
    conv.forward = lambda x: nn.functional.conv2d(x.float(), conv.weight.float() / 50, conv.bias, padding=1)
    return "mid_block.resnets.0.conv2"


def _padded_otherwise(block) -> str:
    block.conv2.padding_mode = "circular"
    block.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return "mid_block.resnets.0.conv2"


def _hooked(block) -> str:
    block.conv2.forward = block.conv2.forward
    return "mid_block.resnets.0.conv2"


def _another_nonlinearity(block) -> str:
    block.nonlinearity = nn.GELU()
    return "mid_block.resnets.0"


class TestLeftAlone:
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("what", "why"),
        [
            (_subclass, "none of the supported classes"),
            (_parametrized, "parametrized"),
            (_quantised, "not the class's own"),
            (_padded_otherwise, "circular"),
            (_hooked, "not the class's own"),
            (_another_nonlinearity, "GELU"),
        ],
    )
    def test_modules_that_cannot_be_served(self, make, what, why, dtype):
        model, call = make("unet")
        name = what(model.mid_block.resnets[0])
        plain, kinds = call(model), {n: type(m) for n, m in model.named_modules()}
        report = accelerate(model, dtype=dtype)
        (entry,) = (left for left in report.left_alone if left.name == name)
        assert why in entry.why and type(model.get_submodule(name)) is kinds[name]
        assert type(model.mid_block.resnets[0]) is diffusers.models.resnet.ResnetBlock2D
        assert type(model.mid_block.resnets[1]) is FastResnetBlock2D
        assert error(call(model), plain.double()) < (1e-5 if dtype is None else 3e-2)
        unaccelerate(model)
        assert torch.equal(call(model), plain) and not model.get_submodule(name)._forward_pre_hooks

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    def test_lora_from_before(self, make, dtype):
        model, call = make("conditional")
        wrapped = wrap(model)
        plain = call(model)
        report = accelerate(model, dtype=dtype)
        assert sum("LoRA" in left.why for left in report.left_alone) == 2
        assert type(wrapped[0].base_layer) is nn.Linear and type(wrapped[1].base_layer) is nn.Conv2d
        assert error(call(model), plain.double()) < (1e-5 if dtype is None else 3e-2)
        resnet = model.mid_block.resnets[0]
        resnet.conv1 = wrapped[1].base_layer  # unloaded
        without = call(model)
        unaccelerate(model)
        assert error(without, call(model).double()) < (1e-5 if dtype is None else 3e-2)
        resnet.conv1 = wrapped[1]
        assert torch.equal(call(unaccelerate(model)), plain)

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    def test_lora_from_later(self, make, dtype):
        model, call = make("conditional")
        accelerate(model, dtype=dtype)
        without = call(model)
        wrapped = wrap(model)
        result = call(model)
        assert type(wrapped[1].base_layer) is FastConv2d and not torch.allclose(result, without, atol=1e-3)
        unaccelerate(model)
        plain = call(model)
        assert error(result, plain.double()) < (1e-5 if dtype is None else 3e-2)

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    def test_adapters_made_of_adopted_layers(self, make, dtype):
        model, call = make("conditional")
        accelerate(model, dtype=dtype)
        resnet = model.mid_block.resnets[0]
        resnet.conv1 = MadeAlike(resnet.conv1)
        with torch.no_grad():
            result = call(model)
            plain = call(unaccelerate(model))
        assert type(resnet.conv1.thin) is nn.Conv2d
        assert error(result, plain.double()) < (1e-5 if dtype is None else 3e-2)

    def test_attention_of_other_kinds(self, make):
        model, call = make("conditional")

        class Own(AttnProcessor2_0):
            pass

        blocks = [block for _, block in model.named_modules() if isinstance(block, Attention)]
        blocks[0].set_processor(Own())
        blocks[1].set_processor(AttnProcessor())
        blocks[2].set_processor(AttnProcessor())
        blocks[2].upcast_attention = True
        plain = call(model)
        report = accelerate(model)
        left = {entry.why for entry in report.left_alone}
        assert left == {"its processor is Own", "its processor does not scale, or computes in float32"}
        assert [isinstance(block.processor, FastAttnProcessor) for block in blocks[:4]] == [False, True, False, True]
        torch.testing.assert_close(call(model), plain, rtol=1e-4, atol=1e-5)
        unaccelerate(model)
        assert [type(block.processor) for block in blocks[:4]] == [Own, AttnProcessor, AttnProcessor, AttnProcessor2_0]

    def test_models_that_somebody_moves(self, make):
        for change, why in (
            (lambda m: setattr(m, "_hf_hook", object()), "hook"),
            (lambda m: setattr(m, "forward", m.forward), "hook"),
            (lambda m: m.conv_in.to("meta"), "memory"),
            (lambda m: m.compile(), "compiled"),
        ):
            model, _ = make("unet")
            change(model)
            before = {name: type(module) for name, module in model.named_modules()}
            report = accelerate(model)
            assert not report.replaced and why in report.left_alone[0].why
            assert {name: type(module) for name, module in model.named_modules()} == before


class TestPipelines:
    def pipe(self, make, scheduler=None):
        pipe = diffusers.DDIMPipeline(make("unet")[0], diffusers.DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe

    def images(self, pipe) -> torch.Tensor:
        return pipe(2, torch.Generator().manual_seed(0), num_inference_steps=4, output_type="pt").images

    @pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
    def test_the_images_stay(self, make, dtype, tolerance):
        pipe = self.pipe(make)
        scheduler, plain = pipe.scheduler, self.images(pipe)
        report = accelerate(pipe, dtype=dtype)
        assert error(self.images(pipe), plain.double()) < tolerance
        assert type(pipe.scheduler) is FastDDIMScheduler and report.replaced[-1].name == "scheduler"
        assert unaccelerate(pipe) is pipe and pipe.scheduler is scheduler
        assert torch.equal(self.images(pipe), plain)

    def test_saved_and_loaded(self, make, tmp_path):
        pipe = self.pipe(make)
        plain = self.images(pipe)
        accelerate(pipe)
        expected = self.images(pipe)
        pipe.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
        loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(self.images(loaded), plain)
        accelerate(loaded)
        assert torch.equal(self.images(loaded), expected)

    def test_a_scheduler_in_the_middle_of_a_run(self, make):
        pipe = self.pipe(make)
        pipe.scheduler.set_timesteps(7)
        expected = pipe.scheduler.step(torch.ones(1, 3, 4, 4), 426, torch.ones(1, 3, 4, 4)).prev_sample
        accelerate(pipe)
        assert pipe.scheduler.timesteps.tolist() == [852, 710, 568, 426, 284, 142, 0]
        assert torch.equal(pipe.scheduler.step(torch.ones(1, 3, 4, 4), 426, torch.ones(1, 3, 4, 4)).prev_sample, expected)

    def test_schedulers_left_alone(self, make):
        changed = diffusers.DDIMScheduler()
        changed.alphas_cumprod = changed.alphas_cumprod**2
        for scheduler, why in ((diffusers.DDPMScheduler(), "none of the supported classes"), (changed, "alphas_cumprod")):
            pipe = self.pipe(make, scheduler)
            report = accelerate(pipe)
            assert pipe.scheduler is scheduler and why in report.left_alone[-1].why

    def test_a_scheduler_set_later_stays(self, make):
        pipe = self.pipe(make)
        accelerate(pipe)
        pipe.scheduler = own = diffusers.DDPMScheduler()
        unaccelerate(pipe)
        assert pipe.scheduler is own
        own = FastDDIMScheduler()
        pipe.scheduler = own
        accelerate(pipe)
        assert unaccelerate(pipe).scheduler is own

    def test_the_other_components(self, make):
        class Both(diffusers.DiffusionPipeline):
            def __init__(self, unet, vae, scheduler, inverse_scheduler, guide):
                super().__init__()
                self.register_modules(unet=unet, vae=vae, scheduler=scheduler, inverse_scheduler=inverse_scheduler, guide=guide)

        vae = diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8)
        guide = diffusers.UNet1DModel()
        pipe = Both(make("unet")[0], vae, diffusers.DDIMScheduler(), diffusers.DDIMInverseScheduler(), guide)
        report = accelerate(pipe, dtype=torch.bfloat16)
        assert type(pipe.inverse_scheduler) is FastDDIMInverseScheduler
        assert type(vae.decoder.mid_block.resnets[0]) is FastResnetBlock2D
        assert [left.name for left in report.left_alone] == ["guide"]
        assert any(entry.name == "vae.decoder.mid_block.resnets.0" for entry in report.replaced)
        unaccelerate(pipe)
        assert type(pipe.inverse_scheduler) is diffusers.DDIMInverseScheduler
        assert type(vae.decoder.mid_block.resnets[0]) is diffusers.models.resnet.ResnetBlock2D


class TestTheReport:
    def test_says_what_and_why(self, make):
        model, _ = make("unet")
        _subclass(model.mid_block.resnets[0])
        report = accelerate(model, dtype=torch.bfloat16)
        text = str(report)
        for part in (
            "replaced:",
            "7 ResnetBlock2D by group_norm_silu, conv3x3",
            "left alone:",
            "1 OwnConv because",
            "conv_in, ",
        ):
            assert part in text, text
        assert json.loads(json.dumps(report.as_dict()))["left_alone"][0]["name"] == "mid_block.resnets.0.conv2"
        names = dict(model.named_modules()).keys()
        assert all(entry.name in names for entry in (*report.replaced, *report.left_alone))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (lambda: 3, "got int"),
            (lambda: nn.Linear(2, 2), "got Linear"),
            (lambda: UNet(UNetConfig.preset("grey-32")), "made of these operators already"),
            (lambda: torch.compile(diffusers.UNet2DModel(**BLOCKS, **ATTENTION)), "then compile it"),
        ],
    )
    def test_what_is_no_network_is_an_error(self, given, message):
        thing = given()
        for function in (accelerate, refresh, unaccelerate):
            with pytest.raises(ValueError, match=message):
                function(thing)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dtype": torch.int8}, "dtype must be.*got torch.int8"),
            ({"dtype": "bf16"}, "dtype must be.*got 'bf16'"),
            ({"engine": "fast"}, "unknown engine 'fast'"),
            ({"engine": "captured"}, "CUDA graph"),
        ],
    )
    def test_options_that_cannot_be_served_change_nothing(self, make, options, message):
        model, _ = make("unet")
        before = places(model)
        with pytest.raises(ValueError, match=message):
            accelerate(model, **options)
        assert_same_places(places(model), before)

    def test_the_public_names(self):
        assert ddim_fast.accelerate is accelerate and {"accelerate", "unaccelerate"} <= set(ddim_fast.__all__)
