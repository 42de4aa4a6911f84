import copy

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from ddim_fast import UNet, UNetConfig
from ddim_fast.models.unet_blocks import batch_invariant

SMALL = {
    "sample_size": 16,
    "base_channels": 16,
    "channel_multipliers": (1, 2, 3),
    "attention_resolutions": (8,),
    "norm_num_groups": 8,
    "dropout": 0.0,
}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Fill in what starts as zeros and ones: they would hide most mistakes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
            elif not p.any():
                p.normal_(std=0.05)
    return model.eval()


def make_unet(**fields) -> UNet:
    return randomise(UNet(UNetConfig(**{**SMALL, **fields})))


def diffusers_twin(model: UNet) -> UNet2DModel:
    """The same network, with the same weights, in diffusers."""
    config = model.config
    attends = [config.sample_size // 2**i in config.attention_resolutions for i in range(len(config.level_channels))]
    with torch.device("meta"):
        twin = UNet2DModel(
            sample_size=config.sample_size,
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            block_out_channels=config.level_channels,
            layers_per_block=config.layers_per_block,
            attention_head_dim=config.attention_head_dim,
            norm_num_groups=config.norm_num_groups,
            norm_eps=config.norm_eps,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
            downsample_padding=config.downsample_padding,
            num_class_embeds=None if config.num_classes is None else config.num_classes + 1,
        )
    twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    model.load_state_dict(twin.state_dict(), strict=True)
    return twin.eval()


@torch.no_grad()
def assert_equals_diffusers(model: UNet, batch: int = 3) -> None:
    x = torch.randn(batch, *model.config.image_shape, generator=torch.Generator().manual_seed(2))
    timesteps = torch.tensor([0, 3, 999])[-batch:]
    labels = None if model.config.num_classes is None else torch.arange(batch) % (model.config.num_classes + 1)
    theirs = diffusers_twin(model)(x, timesteps, class_labels=labels).sample
    assert theirs.std() > 0.05
    torch.testing.assert_close(model(x, timesteps, labels), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"channel_multipliers": (1,), "attention_resolutions": ()},
        {"layers_per_block": 1, "attention_resolutions": (16, 4)},
        {"layers_per_block": 3, "channel_multipliers": (1, 3), "in_channels": 1},
        {"attention_head_dim": 8},
        {"attention_head_dim": 16, "attention_resolutions": (16, 8, 4)},
        {"downsample_padding": 1},
        {"flip_sin_to_cos": True},
        {"freq_shift": 0},
        {"flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5},
        {"norm_eps": 1e-2},
        {"num_classes": 2},
        {"base_channels": 15, "norm_num_groups": 5},
    ],
    ids=lambda fields: ",".join(f"{k}={v}" for k, v in fields.items()) or "every kind of layer",
)
def test_equals_diffusers(fields):
    assert_equals_diffusers(make_unet(**fields))


def test_celeba_64_equals_diffusers_at_a_small_width():
    fields = UNetConfig.preset("celeba-64", base_channels=16, norm_num_groups=8).to_dict()
    assert fields["channel_multipliers"] == [1, 2, 2, 2, 4]
    assert_equals_diffusers(make_unet(**fields), batch=1)


def test_cifar10_128_is_the_published_network():
    model = randomise(UNet(UNetConfig.preset("cifar10-128")))
    assert sum(p.numel() for p in model.parameters()) == 35_746_307
    assert_equals_diffusers(model, batch=1)


def test_no_labels_are_the_null_class():
    model = make_unet(num_classes=4)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10, 20])
    with torch.no_grad():
        unlabelled = model(x, t)
        assert torch.equal(unlabelled, model(x, t, torch.tensor([4, 4])))
        assert not torch.allclose(unlabelled, model(x, t, torch.tensor([4, 0])), atol=1e-4)


def test_labels_for_an_unconditional_network_are_refused():
    with pytest.raises(ValueError, match="unconditional"):
        make_unet()(torch.zeros(1, 3, 16, 16), torch.tensor(0), torch.tensor([1]))


def test_what_is_no_configuration_is_refused():
    with pytest.raises(ValueError, match=r"takes a UNetConfig.*got 'cifar10-64'"):
        UNet("cifar10-64")


@pytest.mark.parametrize("name", ["grey-32", "celeba-64"])
def test_a_fresh_network_returns_zeros(name):
    model = UNet(UNetConfig.preset(name, base_channels=16, norm_num_groups=8, num_classes=3))
    x = torch.randn(1, *model.config.image_shape)
    with torch.no_grad():
        assert not model(x, torch.tensor(7)).any()


def test_a_fresh_networks_residual_branches_are_the_identity():
    model = UNet(UNetConfig(**SMALL))
    x, shifts = torch.randn(1, 48, 4, 4), torch.randn(2, 1, 48)
    with torch.no_grad():
        torch.testing.assert_close(model.mid_block(x, *shifts), x)


def test_every_parameter_gets_a_finite_gradient():
    model = make_unet(num_classes=4, attention_head_dim=8, dropout=0.1).train()
    model(torch.randn(2, 3, 16, 16), torch.tensor([1, 900]), torch.tensor([0, 4])).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        # A key's bias adds the same to each of a query's scores, and softmax takes it away again.
        assert p.grad.any() or name.endswith("to_k.bias"), name


def test_one_timestep_stands_for_all():
    model = make_unet()
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = model(x, torch.full((3,), 421))
        for timesteps in (
            torch.tensor(421),
            torch.tensor([421]),
            torch.tensor(421.0),
            torch.full((3,), 421, dtype=torch.int32),
        ):
            torch.testing.assert_close(model(x, timesteps), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_output_has_the_networks_dtype(dtype):
    model = make_unet(num_classes=2)
    x, t, labels = torch.randn(1, 3, 16, 16), torch.tensor([999]), torch.tensor([1])
    with torch.no_grad():
        expected = model(x, t, labels)
        actual = model.to(dtype)(x.to(dtype), t, labels)
    assert actual.dtype == model.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)


def test_memory_format_does_not_change_the_numbers():
    model = make_unet()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor(5)
    with torch.no_grad():
        expected = model(x, t)
        actual = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_dropout_is_for_training_only():
    model = make_unet(dropout=0.5)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor(5)
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x, t))
        model.train()
        assert not torch.equal(model(x, t), model(x, t))


@torch.no_grad()
def test_timesteps_and_labels_may_be_plain_numbers():
    model, x = make_unet(num_classes=4), torch.randn(2, 3, 16, 16)
    expected = model(x, torch.tensor([5, 5]), torch.tensor([2, 2]))
    for timesteps, labels in ((5, 2), (5, [2, 2]), ([5, 5], 2), (torch.tensor(5), 2), (np.int64(5), torch.tensor(2))):
        assert torch.equal(model(x, timesteps, labels), expected)
    assert torch.equal(model(x, [5, 7]), model(x, torch.tensor([5, 7])))


@pytest.mark.slow
@torch.no_grad()
def test_plain_numbers_compile_without_graph_breaks():
    model = make_unet(channel_multipliers=(1, 2), layers_per_block=1, num_classes=4)
    x, compiled = torch.randn(2, 3, 16, 16), torch.compile(model, fullgraph=True, backend="eager")
    for arguments in ((5, 2), (6, 2), (torch.tensor(5), torch.tensor([2, 2]))):
        torch.testing.assert_close(compiled(x, *arguments), model(x, *arguments), atol=1e-5, rtol=1e-5)


def test_a_network_shows_itself_on_one_line():
    model = make_unet(num_classes=4)
    numbers = sum(p.numel() for p in model.parameters())
    assert repr(model) == f"UNet(3x16x16, {numbers:,} parameters, 4 classes, epsilon, float32, cpu)"
    assert repr(UNet(UNetConfig(**SMALL)).to("meta", torch.float64)).endswith(" parameters, epsilon, float64, meta)")
    assert repr(model.for_inference(torch.bfloat16)).endswith(" parameters, 4 classes, epsilon, bfloat16, cpu)")
    assert "Conv3x3" in repr(model.mid_block)


@pytest.mark.slow
def test_training_compiles_without_graph_breaks():
    model = make_unet(channel_multipliers=(1, 2), layers_per_block=1, num_classes=4).train()
    arguments = torch.randn(2, 3, 16, 16), torch.tensor([1, 900]), torch.tensor([0, 4])
    expected = model(*arguments)
    expected.square().mean().backward()
    gradient = model.conv_in.weight.grad.clone()
    model.zero_grad()
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments)
    actual.square().mean().backward()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.conv_in.weight.grad, gradient, atol=1e-5, rtol=1e-4)


def test_every_implementation_of_the_operators_gives_the_same_network(backend, small_unet, monkeypatch):
    torch.manual_seed(0)
    model = small_unet.to(backend.device, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16, device=backend.device).to(memory_format=torch.channels_last)
    arguments = (x, torch.tensor([3, 700], device=backend.device), torch.tensor([1, 9], device=backend.device))
    with torch.no_grad():
        actual = model(*arguments)
        monkeypatch.setenv("DDIM_FAST_BACKEND", "reference")
        torch.testing.assert_close(actual, model(*arguments), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton-interpreter", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True)
def test_the_network_trains_on_triton_kernels(backend, small_unet, monkeypatch):
    torch.manual_seed(0)
    model = small_unet.to(backend.device, memory_format=torch.channels_last)  # in eval mode: dropout would differ
    x = torch.randn(2, 3, 16, 16, device=backend.device).to(memory_format=torch.channels_last)
    t = torch.tensor([3, 700], device=backend.device)

    def gradients():
        loss = model(x, t).square().mean()
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)

    actual = gradients()
    monkeypatch.setenv("DDIM_FAST_BACKEND", "reference")
    for one, other in zip(actual, gradients(), strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, atol=1e-5 * float(other.abs().max()) + 1e-7, rtol=1e-3)


def test_skip_connections_are_read_where_they_lie(small_unet):
    """The residual block on two inputs is the block on their concatenation, in either memory format."""
    block = small_unet.up_blocks[0].resnets[0]
    channels = block.norm1.num_channels
    x, skip = torch.randn(2, channels - 16, 8, 8), torch.randn(2, 16, 8, 8)
    shift = torch.randn(2, block.norm2.num_channels)
    for layout in (torch.contiguous_format, torch.channels_last):
        parts = [t.to(memory_format=layout) for t in (x, skip)]
        with torch.no_grad():
            expected = block(torch.cat(parts, 1), shift)
            torch.testing.assert_close(block(parts[0], shift, parts[1]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prepare", [False, True])
def test_a_copy_for_inference_is_about_as_exact_as_autocast(prepare, small_unet, monkeypatch):
    """Winograd's convolution rounds its input once more, after its transform: up to half as much error again."""
    if not prepare:
        monkeypatch.setenv("DDIM_FAST_BACKEND", "reference")
    torch.manual_seed(0)
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([1, 9])
    before = {name: p.clone() for name, p in small_unet.state_dict().items()}
    model = small_unet.for_inference(torch.bfloat16)
    with torch.no_grad():
        exact = small_unet(x, t, labels)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = small_unet(x, t, labels)
        actual = model(x.bfloat16(), t, labels)
    assert actual.dtype == torch.bfloat16
    assert (actual - exact).square().mean() <= (1.5 if prepare else 1.2) ** 2 * (autocast - exact).square().mean()
    # The network itself stays as it was, and the copy needs no gradient.
    assert all(torch.equal(p, before[name]) for name, p in small_unet.state_dict().items())
    assert small_unet.conv_in.weight.requires_grad and not any(p.requires_grad for p in model.parameters())
    assert model.time_embedding.linear_1.weight.dtype == model.conv_norm_out.weight.dtype == torch.float32


def test_attention_of_one_head_needs_two_linear_layers():
    """The copy for inference computes the same function; in float64, to its last digits."""
    model = make_unet().double()
    folded = copy.deepcopy(model.mid_block.attentions[0]).requires_grad_(False)
    folded.fold(torch.float64)
    assert folded.to_k is None and folded.to_v is None
    x = 3 * torch.randn(2, 48, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model.mid_block.attentions[0](x), rtol=1e-12, atol=1e-12)


def test_a_copy_for_inference_can_be_copied_again():
    model = make_unet().for_inference(torch.float32)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor(500)
    assert torch.equal(model.for_inference(torch.float32)(x, t), model(x, t))


def test_attention_of_several_heads_keeps_its_layers():
    model = make_unet(attention_head_dim=8)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor(500)
    inference = model.for_inference(torch.float32)
    assert inference.mid_block.attentions[0].to_k is not None
    with torch.no_grad():
        torch.testing.assert_close(inference(x, t), model(x, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_attention_of_several_heads_can_have_one_product_for_query_key_and_value(monkeypatch, layout):
    """Nothing is copied between the product and the attention; in float64 it is the same function to the last digits."""
    pytest.importorskip("triton")
    model = make_unet(attention_head_dim=8).double()
    plain = model.mid_block.attentions[0]
    joined = copy.deepcopy(plain).requires_grad_(False)
    state = torch.get_rng_state()
    with monkeypatch.context() as forced:
        forced.setenv("DDIM_FAST_BACKEND", "triton")
        for _ in range(2):  # a copy for inference can be copied again
            joined.fold(torch.float64)
    assert joined.to_k is None and joined.to_v is None and joined.to_q.weight.shape == (3 * 48, 48)
    assert torch.equal(torch.get_rng_state(), state)
    seen = []

    def noted(query, key, value):
        seen.extend((query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    monkeypatch.setattr("ddim_fast.models.unet_blocks.attention", noted)
    x = 3 * torch.randn(2, 48, 4, 4, dtype=torch.float64).contiguous(memory_format=layout)
    with torch.no_grad():
        torch.testing.assert_close(joined(x), plain(x), rtol=1e-12, atol=1e-12)
    assert len({t.untyped_storage().data_ptr() for t in seen[:3]}) == 1 and seen[0].stride(3) == 1


class Counting(torch.nn.Module):
    """Counts its calls; what it returns depends on the batch, or does not."""

    def __init__(self, depends: bool) -> None:
        super().__init__()
        self.depends, self.sizes = depends, []

    def forward(self, x):
        self.sizes.append(len(x))
        return x + len(x) if self.depends else x


@pytest.mark.parametrize("depends", [False, True])
def test_an_image_is_computed_twice_only_where_its_bits_depend_on_the_batch(depends):
    operator, x = Counting(depends), torch.randn(1, 2, 3, 3)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(batch_invariant(operator, x, owner=operator), operator(x.expand(2, -1, -1, -1))[:1])
    # The first two calls find out.
    assert operator.sizes == [1, 2, *([2, 2] if depends else [1, 2]) * 2]
    operator.batch_invariant, operator.sizes = False, []
    with torch.no_grad():
        batch_invariant(operator, x, owner=operator)
    assert operator.sizes == [1]


def test_what_is_traced_is_computed_once():
    operator = Counting(True)
    with torch.no_grad():
        torch.jit.trace(lambda x: batch_invariant(operator, x, owner=operator), torch.zeros(1, 2, 3, 3), check_trace=False)
    assert operator.sizes == [1]


def test_finding_out_leaves_the_users_random_numbers_alone():
    expected = torch.get_rng_state()
    with torch.no_grad():
        batch_invariant(operator := Counting(False), torch.zeros(1, 2, 3, 3), owner=operator)
    assert torch.equal(torch.get_rng_state(), expected)
