"""Accelerated networks of diffusers where something else looks on: autocast, tracers, differentiation, and later changes."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from ddim_fast import accelerate, unaccelerate
from tests.helpers.small_networks import ATTENTION, BLOCKS, CROSS

diffusers = pytest.importorskip("diffusers")

from diffusers.hooks import apply_group_offloading  # noqa: E402 - it needs diffusers
from diffusers.models.attention_processor import AttnProcessor  # noqa: E402

from ddim_fast.interop.diffusers_modules import FAST, FastAttnProcessor  # noqa: E402
from ddim_fast.ops.weight_cache import _entries  # noqa: E402

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LATENT = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1.0, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
DTYPES = pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)


@pytest.fixture
def make(randomise):
    """A function that makes the network of a class of diffusers, always the same."""

    def make(kind: type[nn.Module], **options) -> nn.Module:
        torch.manual_seed(0)
        return randomise(kind(**BLOCKS, **options))

    return make


@pytest.fixture
def network(make):
    return functools.partial(make, diffusers.UNet2DModel, **ATTENTION)


@pytest.fixture
def conditional(make):
    return functools.partial(make, diffusers.UNet2DConditionModel, **CROSS)


class Called(nn.Module):
    """The network as a function of the image alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, 321).sample


def accelerated(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    accelerate(model, dtype=dtype)
    return model


def close(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    scale = float(expected.detach().float().abs().max())
    torch.testing.assert_close(result, expected, atol=(1e-5 if dtype is None else 4e-2) * scale, rtol=0)


@DTYPES
def test_autocast(network, conditional, dtype):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        close(accelerated(network(), dtype)(X, 5).sample, network()(X, 5).sample, torch.bfloat16)
        plain = conditional()(LATENT, 5, TEXT).sample
        close(accelerated(conditional(), dtype)(LATENT, 5, TEXT).sample, plain, torch.bfloat16)


@DTYPES
class TestTraced:
    """What is written down must not depend on memory that no operator of PyTorch's has filled."""

    @torch.no_grad()
    def test_jit(self, network, dtype):
        model = Called(accelerated(network(), dtype))
        traced = torch.jit.trace(model, X, check_trace=False)
        close(traced(X + 1), model(X + 1), dtype)

    @pytest.mark.parametrize("mode", [pytest.param("real", marks=pytest.mark.slow), "fake"])
    @torch.no_grad()
    def test_make_fx(self, network, dtype, mode):
        model = Called(accelerated(network(), dtype))
        expected = model(X + 1)
        graph = make_fx(lambda x: model(x), tracing_mode=mode, _allow_non_fake_inputs=True)(X)
        close(graph(X + 1), expected, dtype)
        assert torch.equal(model(X + 1), expected)  # nothing of the fake tensors was kept


@torch.no_grad()
def test_the_older_export_to_onnx(network):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model, file = Called(accelerated(network())), io.BytesIO()
    torch.onnx.export(model, (X,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (name,) = (given.name for given in session.get_inputs())
    close(torch.from_numpy(session.run(None, {name: (X + 1).numpy()})[0]), model(X + 1))


class TestDifferentiated:
    @pytest.fixture
    def convolutional(self, make):
        """Without attention, of which diffusers has no forward-mode derivative."""
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}

        def frozen() -> nn.Module:
            return make(diffusers.UNet2DModel, **blocks, add_attention=False).requires_grad_(False)

        return frozen

    def test_forward_mode(self, convolutional):
        def tangent(model: nn.Module) -> torch.Tensor:
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(model(forward_ad.make_dual(X, X.flip(0)), 5).sample).tangent

        close(tangent(accelerated(convolutional())), tangent(convolutional()))

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f: torch.func.vmap(f)(X[:, None]),
            lambda f: torch.func.jvp(f, (X,), (X.flip(0),))[1],
            lambda f: torch.func.grad(lambda x: f(x).sin().sum())(X),
        ],
        ids=["vmap", "jvp", "grad"],
    )
    def test_torch_func(self, convolutional, transform):
        results = [transform(Called(model)) for model in (accelerated(convolutional()), convolutional())]
        close(*results)

    @DTYPES
    @pytest.mark.parametrize("part", ["norm", "conv_shortcut", "to_q", "time_emb_proj"])
    def test_some_weights_alone(self, network, dtype, part):
        """Norms alone crashed in PyTorch, whose gradient of theirs takes no channels_last image that needs none itself."""

        def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(part in name)
            model(X, 5).sample.sin().sum().backward()
            return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

        ours, theirs = gradients(accelerated(network(), dtype)), gradients(network())
        assert ours.keys() == theirs.keys() and ours
        for name, gradient in theirs.items():
            close(ours[name], gradient, dtype)

    def test_where_all_is_recorded_the_bits_are_those_from_before(self, network):
        assert torch.equal(accelerated(network())(X, 5).sample, network()(X, 5).sample)

    def test_where_all_is_recorded_the_dtype_is_that_from_before(self, network):
        close(accelerated(network(), torch.bfloat16)(X, 5).sample, network()(X, 5).sample)


class TestChangedAfterwards:
    @pytest.fixture(autouse=True)
    def for_inference(self):
        with torch.no_grad():
            yield

    @pytest.mark.parametrize("hook", ["layerwise casting", "group offloading"])
    def test_hooks_that_came_later_outlive_it(self, network, hook):
        if hook == "group offloading":
            pytest.importorskip("accelerate")
        model, plain = network(), network()
        accelerate(model)
        for each in (model, plain):
            if hook == "layerwise casting":
                each.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
            else:
                cpu = torch.device("cpu")
                apply_group_offloading(each, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        close(model(X, 5).sample, plain(X, 5).sample)
        unaccelerate(model)
        assert torch.equal(model(X, 5).sample, plain(X, 5).sample)
        accelerate(model)
        close(model(X, 5).sample, plain(X, 5).sample)

    @DTYPES
    @pytest.mark.parametrize("before", [True, False])
    def test_convolutions_that_tile(self, network, dtype, before):
        def tile(model: nn.Module) -> nn.Module:
            for conv in model.modules():
                if isinstance(conv, nn.Conv2d):
                    conv.padding_mode = "circular"
            return model

        model = accelerated(tile(network()), dtype) if before else tile(accelerated(network(), dtype))
        close(model(X, 5).sample, tile(network())(X, 5).sample, dtype)

    @pytest.mark.parametrize("before", [True, False])
    def test_convolutions_of_somebody_elses(self, network, before):
        def halve(model: nn.Module) -> nn.Module:
            conv = model.down_blocks[0].resnets[0].conv1
            conv._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, weight / 2, bias, padding=1)
            return model

        model = accelerated(halve(network())) if before else halve(accelerated(network()))
        close(model(X, 5).sample, halve(network())(X, 5).sample)

    @pytest.mark.parametrize(
        "stored, dtype, moved",
        [
            (torch.float32, torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.float16, torch.bfloat16),
            (torch.float64, torch.float16, torch.float32),
        ],
    )
    def test_moved_to_another_dtype(self, network, conditional, stored, dtype, moved):
        for make, inputs in ((network, (X, 5)), (conditional, (LATENT, 5, TEXT))):
            model = accelerated(make().to(stored), dtype).to(moved)
            result = model(*(i.to(moved) if isinstance(i, torch.Tensor) else i for i in inputs)).sample
            assert result.dtype == moved
            close(result.float(), make()(*inputs).sample, torch.bfloat16)

    def test_what_was_made_for_another_dtype_goes(self, network):
        def held(model: nn.Module) -> int:
            model(X.to(model.dtype), 5)
            return sum(len(_entries.get(parameter, ())) for parameter in model.parameters())

        model = accelerated(network())
        first = held(model)
        held(model.to(torch.bfloat16))
        assert held(model.to(torch.float32)) == first > 0

    @pytest.mark.parametrize("processor", [None, "plain", "sliced"])
    @pytest.mark.parametrize("before", [True, False])
    def test_masks_in_another_dtype(self, conditional, processor, before):
        def with_processor(model: nn.Module) -> nn.Module:
            if processor == "sliced":
                model.set_attention_slice(1)
            elif processor == "plain":
                model.set_attn_processor(AttnProcessor())
            return model

        plain = with_processor(conditional())(LATENT, 5, TEXT, encoder_attention_mask=MASK).sample
        if before:
            model = accelerated(with_processor(conditional()), torch.bfloat16)
        else:
            model = with_processor(accelerated(conditional(), torch.bfloat16))
        close(model(LATENT, 5, TEXT, encoder_attention_mask=MASK).sample, plain, torch.bfloat16)
        unaccelerate(model)
        assert torch.equal(model(LATENT, 5, TEXT, encoder_attention_mask=MASK).sample, plain)

    def test_masks_of_true_and_false(self, conditional):
        model, plain = accelerated(conditional()), conditional()
        tokens, mask = LATENT.flatten(2).transpose(1, 2).repeat(1, 1, 4), MASK[:, None].bool()
        ours, theirs = (m.down_blocks[0].attentions[0].transformer_blocks[0].attn2 for m in (model, plain))
        result = theirs(tokens, TEXT, attention_mask=mask)
        close(ours(tokens, TEXT, attention_mask=mask), result)
        assert not torch.allclose(theirs(tokens, TEXT), result)

    def test_adapters_make_processors_of_ours(self):
        assert type(FastAttnProcessor().original) is diffusers.models.attention_processor.AttnProcessor2_0

    def test_what_watches_the_parts_of_a_block(self, network):
        def watch(model: nn.Module) -> list[torch.Tensor]:
            seen: list[torch.Tensor] = []
            for module in (model.down_blocks[0].resnets[0].nonlinearity, model.conv_norm_out):
                module.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
            seen.append(model(X, 5).sample)
            return seen

        ours, theirs = watch(accelerated(network())), watch(network())
        assert len(ours) == len(theirs) > 3
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)

    def test_another_output_norm_keeps_its_silu(self, network):
        model, plain = accelerated(network()), network()
        model.conv_norm_out = plain.conv_norm_out = nn.Identity()
        close(model(X, 5).sample, plain(X, 5).sample)


class TestPipelines:
    def make(self, model: nn.Module, **options) -> diffusers.DDIMPipeline:
        return diffusers.DDIMPipeline(unet=model, scheduler=diffusers.DDIMScheduler(**options))

    def test_one_whose_network_is_compiled_can_be_undone(self, network):
        pipe = self.make(network())
        accelerate(pipe)
        pipe.unet = torch.compile(pipe.unet)
        assert any(type(module) in FAST for module in pipe.unet.modules())
        unaccelerate(pipe)
        assert not any(type(module) in FAST for module in pipe.unet.modules())
        (left,) = accelerate(pipe).left_alone
        assert (left.kind, "compiled already" in left.why) == ("UNet2DModel", True)

    def test_it_is_their_scheduler_that_is_saved(self, network, tmp_path):
        pipe = self.make(network())
        accelerate(pipe)
        pipe.save_pretrained(tmp_path / "ours")
        unaccelerate(pipe).save_pretrained(tmp_path / "theirs")
        for name in ("scheduler/scheduler_config.json", "model_index.json"):
            assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()

    @pytest.mark.parametrize(
        "change, why",
        [
            (lambda s: setattr(s, "final_alpha_cumprod", s.alphas_cumprod[3]), "its final_alpha_cumprod was changed"),
            (lambda s: setattr(s, "init_noise_sigma", 2.0), "its init_noise_sigma was changed"),
            (lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod * 0.9), "its alphas_cumprod was changed"),
            (lambda s: s.set_timesteps(10) or setattr(s, "timesteps", s.timesteps[2:]), "its timesteps was changed"),
            (lambda s: setattr(s, "step", lambda *args, **kwargs: None), "its step is not diffusers' own"),
        ],
        ids=["final", "sigma", "alphas", "timesteps", "step"],
    )
    def test_a_scheduler_changed_by_hand_is_left_alone(self, network, change, why):
        pipe = self.make(network())
        change(pipe.scheduler)
        scheduler = pipe.scheduler
        (left,) = accelerate(pipe).left_alone
        assert left.name == "scheduler" and why in left.why and pipe.scheduler is scheduler
