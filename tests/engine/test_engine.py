"""Every engine gives the images of the eager one, for whatever is asked of it next."""

import warnings
from typing import NamedTuple

import pytest
import torch

from ddim_fast import Sampler, UNet, UNetConfig
from ddim_fast.diffusion.denoiser import Denoiser
from ddim_fast.diffusion.guidance import likelihood_gradient
from ddim_fast.diffusion.loop import Loop
from ddim_fast.diffusion.network import Network
from ddim_fast.diffusion.request import Request
from ddim_fast.engine import fastest_engine, make_engine
from ddim_fast.engine.compiled import signature
from ddim_fast.ops import native

SOLVERS = [
    ("ddim", 0.0),
    ("ddim", 1.0),
    ("ddpm", 0.0),
    ("dpm-solver++", 0.0),
    ("unipc", 0.0),
    ("dpm-solver++3m", 0.0),
    ("heun", 0.0),
]


class Case(NamedTuple):
    """An engine, and where it runs."""

    name: str
    device: str


ENGINES = [
    pytest.param(Case("compiled", "cpu"), id="compiled", marks=pytest.mark.slow),
    pytest.param(Case("captured", "cpu"), id="captured-cpu"),
    pytest.param(Case("captured", "cuda"), id="captured-cuda", marks=pytest.mark.gpu),
]


@pytest.fixture
def make_network(fake_network):
    """A function (engine, num_classes) that makes a network: a fake one or, for plans of native operators, a U-Net."""

    def make(engine: Case, num_classes: int | None = None) -> torch.nn.Module:
        if engine != Case("captured", "cpu"):
            return fake_network(num_classes=num_classes).to(engine.device)
        sizes = {"base_channels": 16, "channel_multipliers": (1, 2), "layers_per_block": 1, "attention_resolutions": ()}
        torch.manual_seed(0)
        network = UNet(UNetConfig(sample_size=8, norm_num_groups=8, num_classes=num_classes, **sizes)).eval()
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.05)
        return network

    return make


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("solver,eta", SOLVERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_agrees_with_eager_and_repeats_itself(engine, solver, eta, guidance, make_network):
    network = make_network(engine, num_classes=4)
    options = {"steps": 4, "solver": solver, "eta": eta, "spacing": "trailing"}
    eager, other = Sampler(network, **options), Sampler(network, engine=engine.name, **options)
    request = {"seeds": [3, 1, 2], "labels": [0, 3, 1], "guidance": guidance}
    images = other.sample(**request)
    torch.testing.assert_close(images, eager.sample(**request), atol=1e-4, rtol=1e-4)
    # New seeds, classes and scales take the same compiled code, or graph; and so does the first request again.
    new = {"seeds": [7, 8, 9], "labels": [2, 2, 0], "guidance": guidance and 4.0}
    torch.testing.assert_close(other.sample(**new), eager.sample(**new), atol=1e-4, rtol=1e-4)
    assert torch.equal(other.sample(**request), images)


@pytest.mark.parametrize("engine", ENGINES)
def test_another_batch_size_or_kind_of_request_is_prepared_anew(engine, make_network):
    network = make_network(engine, num_classes=4)
    eager, other = Sampler(network, steps=3), Sampler(network, steps=3, engine=engine.name)
    for request in ({"seeds": [1]}, {"seeds": [1, 2, 3]}, {"seeds": [5, 6], "labels": 1}, {"seeds": [1]}, {"seeds": [4, 5, 6]}):
        torch.testing.assert_close(other.sample(**request), eager.sample(**request), atol=1e-4, rtol=1e-4)
    images = other.sample(seeds=range(5), batch_size=3)
    torch.testing.assert_close(images, eager.sample(seeds=range(5)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other.encode(images), eager.encode(images), atol=1e-4, rtol=1e-4)
    states = list(other.trajectory(seeds=[1, 2, 3]))
    for state, expected in zip(states, eager.trajectory(seeds=[1, 2, 3]), strict=True):
        torch.testing.assert_close(state.x, expected.x, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(state.x0, expected.x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "unipc"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_guidance_interval_leaves_out_the_same_steps(engine, solver, make_network):
    network = make_network(engine, num_classes=4)
    options = {"steps": None, "spacing": [900, 600, 300, 0], "solver": solver}
    eager, other = Sampler(network, **options), Sampler(network, engine=engine.name, **options)
    for interval in ((300, 600), (600, 999), None):
        request = {"seeds": [1, 2], "labels": [0, 3], "guidance": 2.5, "guidance_interval": interval}
        torch.testing.assert_close(other.sample(**request), eager.sample(**request), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_guide_is_part_of_the_step(engine, make_network):
    network, guide = (make_network(engine, num_classes=4) for _ in range(2))
    next(guide.parameters()).data *= 0.8
    options = {"steps": None, "spacing": [900, 600, 300, 0], "solver": "unipc", "guide": guide}
    eager, other = Sampler(network, **options), Sampler(network, engine=engine.name, **options)
    for guidance, interval in ((2.5, (300, 600)), (4.0, (300, 600)), (1.5, None), (None, None)):
        request = {"seeds": [1, 2], "labels": [0, 3], "guidance": guidance, "guidance_interval": interval}
        torch.testing.assert_close(other.sample(**request), eager.sample(**request), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_requests_that_differ_in_layout_or_mode_follow_each_other(engine, small_unet):
    network = small_unet.to(engine.device)
    sampler, eager = Sampler(network, steps=2, engine=engine.name), Sampler(network, steps=2)
    guided = {"labels": [0, 1, 2, 3], "guidance": 2.0, "guidance_interval": (10, 600)}
    x_T = torch.randn(4, 3, 16, 16)
    plain = {"x_T": x_T, "batch_size": 3}
    requests = (
        {"seeds": range(4), **guided},
        {"seeds": range(4), "labels": [0, 1, 2, 3]},
        plain,
        plain | {"x_T": x_T.clone().requires_grad_()},
        plain | {"x_T": x_T.to(memory_format=torch.channels_last)},
    )
    for request in requests:
        torch.testing.assert_close(sampler.sample(**request), eager.sample(**request), atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(sampler.sample(**plain), eager.sample(**plain), atol=1e-4, rtol=1e-4)


def test_grey_images_of_any_strides_are_one_kind_of_request(fake_network):
    network = fake_network(in_channels=1)
    x_T = torch.randn(5, 8, 8, 1).permute(0, 3, 1, 2)  # contiguous, as images of one channel are, and strided like RGB
    images = Sampler(network, steps=2, engine="compiled").sample(x_T=x_T, batch_size=3)
    torch.testing.assert_close(images, Sampler(network, steps=2).sample(x_T=x_T), atol=1e-4, rtol=1e-4)


def test_a_gradient_runs_between_what_is_compiled(fake_network):
    """Any function, of which torch.compile sees nothing: another one is no recompilation."""
    network = fake_network(num_classes=4)
    eager, compiled = Sampler(network, steps=3, eta=1.0), Sampler(network, steps=3, eta=1.0, engine="compiled")
    for aim in (0.5, -0.5, None):
        gradient = None if aim is None else lambda x, timestep, x0, aim=aim: aim * x0 / (1 + int(timestep))
        request = {"seeds": [1, 2], "labels": [0, 3], "guidance": 2.0, "gradient": gradient}
        torch.testing.assert_close(compiled.sample(**request), eager.sample(**request), atol=1e-4, rtol=1e-4)
        for state, expected in zip(compiled.trajectory(**request), eager.trajectory(**request), strict=True):
            torch.testing.assert_close(state.x, expected.x, atol=1e-4, rtol=1e-4)


def test_a_gradient_cannot_be_captured(fake_network):
    with pytest.raises(ValueError, match="gradient is called between the steps of a run"):
        Sampler(fake_network(), steps=2, engine="captured").sample(seeds=[0], gradient=lambda x, t, x0: x)


@pytest.mark.slow
def test_samplers_do_not_count_as_recompilations_of_each_other(fake_network):
    """torch.compile gives up on a function after eight."""
    for steps in range(1, 11):
        Sampler(fake_network(), steps=steps, engine="compiled").sample(seeds=[0])


@pytest.mark.slow
def test_a_capture_is_no_reason_to_recompile(small_unet):
    compiled, captured = (Sampler(small_unet, steps=1, engine=engine) for engine in ("compiled", "captured"))
    images = compiled.sample(seeds=[0])
    captured.sample(seeds=[0])
    assert torch.equal(compiled.sample(seeds=[0]), images)


def test_a_recompilation_is_an_error(fake_network):
    sampler = Sampler(fake_network(), steps=2, engine="compiled", clip_sample_range=1.0)
    sampler.sample(seeds=[0])
    sampler.solver.clip = 0.5
    with pytest.raises(RuntimeError, match="recompile"):
        sampler.sample(seeds=[0])


def test_captured_needs_the_native_operators_on_a_cpu(fake_network, monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_not", "it was not built")
    with pytest.raises(ValueError, match=r"captured engine needs the C\+\+ operators on a CPU: it was not built"):
        Sampler(fake_network(), steps=2, engine="captured")


@pytest.mark.parametrize("guided", [False, True, "by a gradient"])
@pytest.mark.parametrize("solver,eta", SOLVERS)
def test_no_step_asks_the_host_for_anything(solver, eta, guided, small_config):
    """On the meta device a number that somebody wants to read is an error. It is no CPU, so what runs is what runs on a GPU,
    but for the kernels."""
    sampler = Sampler(UNet(small_config), steps=3, solver=solver, eta=eta, spacing="trailing")
    denoiser = Denoiser(UNet(small_config).to("meta"), dtype=torch.bfloat16)
    loop = Loop(denoiser, sampler.solver, make_engine("eager", denoiser.device))
    labels, gradient = torch.zeros(2, dtype=torch.int64, device="meta"), None
    if guided == "by a gradient":
        gradient = likelihood_gradient(lambda x0: -x0.square().sum((1, 2, 3)), loop.denoiser)
    request = Request(labels, labels=labels, guidance=2.0 if guided else None, gradient=gradient)
    run = loop.prepare(request, sampler.timesteps, sampler.solver.table, torch.zeros(2, 3, 16, 16, device="meta"))
    assert loop.last(run).shape == (2, 3, 16, 16)
    with pytest.raises(RuntimeError):
        run.inputs.x.sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", pytest.param("compiled", marks=pytest.mark.slow), "captured"])
@pytest.mark.parametrize("solver,eta", SOLVERS)
def test_no_step_waits_for_the_gpu(solver, eta, engine, small_config):
    sampler = Sampler(UNet(small_config).to("cuda"), steps=3, solver=solver, eta=eta, spacing="trailing", engine=engine)
    run = _prepared(sampler, seeds=[0, 1], labels=[2, 3], guidance=2.0)
    with torch.no_grad():
        sampler._loop.last(run)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sampler._loop.last(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _prepared(sampler, **request):
    return sampler._loop.prepare(sampler.check(**request), sampler.timesteps, sampler.solver.table)


def test_conditions_are_the_networks_own(small_unet):
    """One row a class where classes are fewer than images, one an image otherwise; and what comes out is the same."""
    network = Network(small_unet, torch.float32)
    timesteps = torch.tensor([900, 500, 20])
    x = torch.randn(24, 3, 16, 16)
    for labels in (torch.arange(24) % 10, torch.tensor([3, 1])):
        conditions = network.conditions(timesteps, labels, guided=False)
        assert conditions[0].shape[1] == (11 if len(labels) == 24 else 2)
        for i, t in enumerate(timesteps):
            with torch.no_grad():
                ours, _ = network(x[: len(labels)], conditions, torch.tensor(i))
                expected = small_unet(x[: len(labels)], t, labels)
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ["eager", pytest.param("compiled", marks=pytest.mark.slow), "captured"])
def test_bfloat16_errs_no_more_than_twice_what_eager_pytorch_does(engine, small_unet, monkeypatch):
    request = {"seeds": range(4), "labels": [1, 2, 3, 4], "guidance": 2.0}
    exact = Sampler(small_unet, steps=4).sample(**request)
    ours = Sampler(small_unet, steps=4, engine=engine, dtype=torch.bfloat16).sample(**request)
    monkeypatch.setenv("DDIM_FAST_BACKEND", "reference")
    plain = Sampler(small_unet, steps=4, dtype=torch.bfloat16).sample(**request)
    assert (ours - exact).square().mean() <= 2**2 * (plain - exact).square().mean()


def test_a_compilation_serves_the_same_shapes_strides_and_dtypes():
    tensors = (torch.ones(2, 3), None, (torch.ones(4),))
    assert signature(tensors) == signature((torch.zeros(2, 3), None, (torch.zeros(4),)))
    for other in (torch.ones(3, 3), torch.ones(3, 2).T, torch.ones(2, 3).double(), None):
        assert signature((other, *tensors[1:])) != signature(tensors)


def test_peak_memory_does_not_depend_on_the_steps():
    """What is kept for each step is one row of numbers: nothing of an image's size."""
    model = UNet(UNetConfig(sample_size=16, base_channels=16, channel_multipliers=(1,), norm_num_groups=8, layers_per_block=1))
    kept = []
    for steps in (2, 50):
        sampler = Sampler(model, steps=steps)
        inputs = _prepared(sampler, seeds=range(64)).inputs
        tensors = [inputs.table, inputs.steps, *inputs.conditions.network]
        kept.append(sum(t.numel() for t in tensors))
    assert kept[1] < 0.1 * 64 * 3 * 16 * 16 + 50 * 200


def test_the_fastest_engine_is_one_that_works_here(monkeypatch):
    gpu, cpu, fp32 = torch.device("cuda", 0), torch.device("cpu"), torch.float32
    monkeypatch.setattr("ddim_fast.engine.why_not_compiled", lambda device: None)
    assert fastest_engine(gpu, fp32) == "captured"
    monkeypatch.setattr(native, "module", object())
    for faster, engine in (({"conv3x3", "captured"}, "captured"), ({"conv3x3"}, "eager"), (set(), "compiled")):
        monkeypatch.setattr("ddim_fast.engine.is_faster_in_cpp", lambda operator, *others, faster=faster: operator in faster)
        assert fastest_engine(cpu, fp32) == engine
    monkeypatch.setattr(native, "module", None)
    assert fastest_engine(cpu, fp32) == "compiled"
    monkeypatch.setattr("ddim_fast.engine.why_not_compiled", lambda device: "no working C++ compiler")
    for device in (cpu, gpu):
        with pytest.warns(UserWarning, match="torch.compile does not work here.*: no working C"):
            assert fastest_engine(device, fp32) == "eager"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_matrix_units_are_left_to_eager_pytorch(dtype, monkeypatch):
    monkeypatch.setattr(native, "module", object())
    for name, value in (("is_faster_in_cpp", True), ("bf16_is_fast", True), ("bf16_products", "amx")):
        monkeypatch.setattr(f"ddim_fast.engine.{name}", lambda *arguments, value=value: value)
    assert fastest_engine(torch.device("cpu"), dtype) == "eager"
    assert fastest_engine(torch.device("cpu"), torch.float32) == "captured"


@pytest.mark.parametrize(
    "dtype,fast,warns", [(torch.bfloat16, False, True), (torch.bfloat16, True, False), (torch.float32, False, False)]
)
def test_a_slow_precision_says_what_it_costs(dtype, fast, warns, small_unet, monkeypatch):
    monkeypatch.setattr("ddim_fast.diffusion.network.bf16_is_fast", lambda device: fast)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Network(small_unet, dtype)
    assert any("5 to 9 times" in str(warning.message) for warning in caught) == warns
