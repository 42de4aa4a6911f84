import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddim_fast import NoiseSchedule, Sampler, UNet, seeded_noise, select_timesteps
from ddim_fast.diffusion.degradations import Blur, CompressedSensing, Downscale, Grey
from ddim_fast.diffusion.denoiser import Denoiser
from ddim_fast.diffusion.editing import move_along, sdedit
from ddim_fast.diffusion.interpolation import slerp
from ddim_fast.diffusion.restoration import TimeTravel
from ddim_fast.diffusion.solvers import FITTED, SOLVERS
from ddim_fast.ops import native
from ddim_fast.ops.noise import INITIAL_NOISE

SHAPE = (3, 8, 8)


def _run_diffusers(scheduler, network, x, steps, *, timesteps=None, noises=None, **options):
    if timesteps is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    states = []
    for i, t in enumerate(scheduler.timesteps):
        extra = {"variance_noise": noises[i]} if noises is not None else {}
        with torch.no_grad():
            x = scheduler.step(network(x, t), t, x, **options, **extra).prev_sample
        states.append(x)
    return states


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_ddim_trajectory_equals_diffusers(eta, prediction_type, clip, beta_schedule, fake_network):
    network = fake_network(prediction_type=prediction_type, beta_schedule=beta_schedule)
    sampler = Sampler(network, steps=20, eta=eta, spacing="leading", clip_sample_range=clip)
    scheduler = DDIMScheduler(
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        clip_sample=clip is not None,
        beta_start=1e-4,
        beta_end=0.02,
    )
    x = seeded_noise([3, 4], INITIAL_NOISE, SHAPE)
    noises = [seeded_noise([3, 4], i, SHAPE) for i in range(20)] if eta else None
    theirs = _run_diffusers(scheduler, network, x, 20, eta=eta, noises=noises)
    for state, expected in zip(sampler.trajectory(seeds=[3, 4]), theirs, strict=True):
        torch.testing.assert_close(state.x, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_snr_equals_diffusers(prediction_type, fake_network):
    network = fake_network(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    scheduler = DDIMScheduler(
        prediction_type=prediction_type, clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    x = seeded_noise([0], INITIAL_NOISE, SHAPE)
    theirs = _run_diffusers(scheduler, network, x, 10)[-1]
    torch.testing.assert_close(Sampler(network, steps=10, spacing="trailing").sample(x_T=x), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddpm_equals_diffusers(clip, prediction_type, fake_network, monkeypatch):
    network = fake_network(prediction_type=prediction_type)
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=clip is not None)
    noises = iter([seeded_noise([5], i, SHAPE) for i in range(20)])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(noises))
    x = seeded_noise([5], INITIAL_NOISE, SHAPE)
    theirs = _run_diffusers(scheduler, network, x, 20)[-1]
    ours = Sampler(network, steps=20, spacing="leading", solver="ddpm", clip_sample_range=clip).sample(seeds=[5])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_ddpm_without_clipping_is_eta_one(fake_network):
    network = fake_network()
    ours = Sampler(network, steps=15, solver="ddpm").sample(seeds=[1])
    torch.testing.assert_close(ours, Sampler(network, steps=15, eta=1.0).sample(seeds=[1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [2, 3, 10, 25])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "solver,scheduler_class,order",
    [
        ("dpm-solver++", DPMSolverMultistepScheduler, 2),
        ("dpm-solver++3m", DPMSolverMultistepScheduler, 3),
        ("unipc", UniPCMultistepScheduler, 2),
    ],
)
def test_multistep_solvers_equal_diffusers(solver, scheduler_class, order, prediction_type, steps, fake_network):
    network = fake_network(prediction_type=prediction_type)
    scheduler = scheduler_class(
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=prediction_type,
        solver_order=order,
        final_sigmas_type="zero",
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(steps)
    x = seeded_noise([2, 9], INITIAL_NOISE, SHAPE)
    theirs = _run_diffusers(scheduler, network, x, steps)
    sampler = Sampler(network, steps=None, spacing=scheduler.timesteps.tolist(), solver=solver)
    for state, expected in zip(sampler.trajectory(x_T=x), theirs, strict=True):
        torch.testing.assert_close(state.x, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [5, 10, 30])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_heun_between_timesteps_equals_diffusers(spacing, prediction_type, steps, fake_network):
    network = fake_network(prediction_type=prediction_type)
    spacings = {f"use_{spacing}_sigmas": True}
    scheduler = HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=prediction_type, **spacings)
    scheduler.set_timesteps(steps)
    sampler = Sampler(network, steps=steps, spacing=spacing, solver="heun")
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), rtol=1e-4, atol=1e-3)
    x = seeded_noise([2, 9], INITIAL_NOISE, SHAPE)
    theirs = x * (1 + scheduler.sigmas[0] ** 2) ** 0.5  # its samples are those with a signal of 1
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(theirs, t), t.expand(2))
        theirs = scheduler.step(output, t, theirs).prev_sample
    torch.testing.assert_close(sampler.sample(x_T=x), theirs, atol=1e-4, rtol=1e-4)
    assert sampler.evaluations.tolist() == [2 * steps - 1] * 2


def test_consistency_sampling_is_new_noise_for_each_x0(fake_network):
    network = fake_network()
    sampler = Sampler(network, steps=None, spacing=[999, 300, 50], solver="consistency")
    (first, second, third), levels = sampler.trajectory(seeds=[5]), sampler.schedule.levels(sampler.timesteps)
    for step, (state, after) in enumerate(((first, second), (second, third))):
        noise = seeded_noise([5], step, SHAPE)
        expected = levels[step + 1] ** 0.5 * state.x0 + (1 - levels[step + 1]) ** 0.5 * noise
        torch.testing.assert_close(after.before, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(third.x, third.x0, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("solver,steps", [("dpm-solver++", 20), ("dpm-solver++3m", 20), ("unipc", 20), ("heun", 20)])
def test_higher_order_solvers_come_closer_to_the_ode(solver, steps, fake_network):
    network = fake_network()
    x = seeded_noise([0], INITIAL_NOISE, SHAPE)
    exact = Sampler(network, steps=1000, spacing="linspace").sample(x_T=x)
    errors = {
        s: (Sampler(network, steps=n, spacing="log-snr", solver=s).sample(x_T=x) - exact).abs().mean()
        for s, n in (("ddim", 20), (solver, steps))
    }
    assert errors[solver] < 0.5 * errors["ddim"]


@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - {FITTED}))
def test_every_solver_survives_zero_terminal_snr(solver, fake_network):
    network = fake_network(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert torch.isfinite(Sampler(network, steps=8, spacing="trailing", solver=solver).sample(seeds=[0])).all()


def test_sigma_hat_adds_the_larger_noise(fake_network):
    network = fake_network()
    a, b = NoiseSchedule.linear().alphas_cumprod[[999, 500]]
    states = {
        eta: next(Sampler(network, steps=None, spacing=[999, 500], eta=eta).trajectory(seeds=[0])).x
        for eta in (1.0, "sigma-hat")
    }
    small = np.sqrt((1 - b) / (1 - a) * (1 - a / b))
    difference = (np.sqrt(1 - a / b) - small) * seeded_noise([0], 0, SHAPE)
    torch.testing.assert_close(states["sigma-hat"] - states[1.0], difference.float(), atol=1e-5, rtol=1e-4)


def test_the_reference_list_with_repeats_equals_the_list_without(fake_network):
    network = fake_network()
    repeated = Sampler(network, steps=100, spacing="ermongroup-quad")
    distinct = Sampler(network, steps=None, spacing=sorted(set(repeated.timesteps.tolist())))
    assert (len(repeated.timesteps), len(distinct.timesteps)) == (100, 96)
    torch.testing.assert_close(repeated.sample(seeds=[1]), distinct.sample(seeds=[1]), atol=1e-5, rtol=1e-5)


def test_the_trajectory_visits_each_timestep_once(fake_network):
    network = fake_network()
    sampler = Sampler(network, steps=12)
    states = list(sampler.trajectory(seeds=[0]))
    expected = select_timesteps(sampler.schedule, 12, "quadratic").tolist()
    assert [s.timestep for s in states] == expected == network.calls
    torch.testing.assert_close(states[-1].x, states[-1].x0, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(states[-1].x, sampler.sample(seeds=[0]))


def test_timesteps_seeds_and_scales_may_be_arrays(fake_network):
    network = fake_network(num_classes=4)
    timesteps = select_timesteps(NoiseSchedule.from_config(network.config), 5, "quadratic")
    sampler = Sampler(network, steps=None, spacing=timesteps)
    expected = sampler.sample(seeds=[0, 1], labels=[1, 2], guidance=2.0)
    for seeds, guidance in ((torch.arange(2), np.float32(2)), (np.arange(2), 2)):
        assert torch.equal(sampler.sample(seeds=seeds, labels=[1, 2], guidance=guidance), expected)
    for one in (3, np.int64(3), np.array(3), torch.tensor(3)):
        with pytest.raises(ValueError, match=r"seeds are a list of whole numbers, one an image; got .*3"):
            sampler.sample(seeds=one)


@pytest.mark.parametrize(
    "whole,scalar",
    [(np.int32, np.float32), (np.array, np.array), (torch.tensor, torch.tensor), (np.uint8, lambda x: np.array(x, np.float16))],
)
def test_numbers_may_be_those_of_numpy_and_torch(whole, scalar, fake_network):
    """Whatever takes a number takes a scalar of numpy's, or an array or a tensor without dimensions."""
    network, grey, half = fake_network(num_classes=4), Grey(3), 0.5

    def results(whole, scalar):
        images = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)
        sampler = Sampler(network, steps=whole(4), eta=scalar(half), clip_sample_range=scalar(half), reuse=whole(1))
        guided = {"labels": whole(1), "guidance": scalar(half), "guidance_interval": (whole(100), whole(200))}
        yield sampler.sample(seeds=[whole(0), whole(1)], batch_size=whole(1), **guided)
        yield sampler.starting_at(whole(200)).sample(seeds=[0], labels=[whole(2)])
        yield Sampler(network, tolerance=scalar(half)).sample(seeds=[0])
        yield Sampler(network, steps=None, spacing=[whole(200), whole(0)]).sample(seeds=[0])
        travel = TimeTravel(whole(1), whole(2))
        options = {"eta": scalar(half), "noise_std": scalar(half), "travel": travel}
        yield sampler.restore(grey(images), grey, seeds=[whole(1), whole(2)], **options)
        for operator in (Downscale(whole(2)), Blur((8, 8), scalar(half)), CompressedSensing((8, 8), scalar(half))):
            yield operator(images)
        plain = Sampler(network, steps=4)
        yield sdedit(plain, images, scalar(half), seeds=[0, 1])
        yield move_along(plain, images, images[0], scalar(half), strength=scalar(half))

    python = results(lambda number: number, lambda number: number)
    for found, expected in zip(results(whole, scalar), python, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.double])
def test_images_and_noise_may_be_arrays(convert, fake_network):
    sampler, grey, x = Sampler(fake_network(), steps=2), Grey(3), torch.randn(2, *SHAPE)
    calls = (
        lambda x: sampler.sample(x_T=x),
        lambda x: [*sampler.trajectory(x_T=x)][-1].x,
        sampler.encode,
        lambda x: sampler.noised(x, [0, 1]),
        lambda x: sdedit(sampler, x, 0.0, seeds=[0, 1]).float(),
        lambda x: move_along(sampler, x, x[0]),
        lambda x: slerp(x[0], x[1], [0.0, 0.5]).float(),
    )
    for call in calls:
        assert torch.equal(call(convert(x)), call(x))
    assert torch.equal(sampler.restore(convert(grey(x)), grey, seeds=[0, 1]), sampler.restore(grey(x), grey, seeds=[0, 1]))
    for wrong in ("noise", [["a"]], object()):
        with pytest.raises(ValueError, match="images and noise must be tensors or arrays of numbers; got"):
            sampler.sample(x_T=wrong)


@pytest.mark.parametrize(
    "kind", [torch.Tensor.byte, torch.Tensor.long, torch.Tensor.bool, torch.Tensor.cfloat, lambda x: x.byte().numpy()]
)
def test_pixels_are_refused(kind, fake_network):
    """They would pass for images far outside of [-1, 1]."""
    sampler, grey, pixels = Sampler(fake_network(), steps=2), Grey(3), kind(torch.full((1, *SHAPE), 7.0))
    calls = (
        lambda x: sampler.sample(x_T=x),
        lambda x: sampler.trajectory(x_T=x),
        sampler.encode,
        lambda x: sampler.noised(x, [0]),
        lambda x: sdedit(sampler, x, 0.5, seeds=[0]),
        lambda x: sampler.restore(x[:, :1], grey, seeds=[0]),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"in \[-1, 1\].* got {pixels.dtype}: convert .* by images / 127\.5 - 1"):
            call(pixels)


def test_x0_is_the_prediction_at_the_timestep(fake_network):
    network = fake_network()
    sampler = Sampler(network, steps=5, clip_sample_range=1.0)
    first = next(sampler.trajectory(seeds=[0]))
    x = seeded_noise([0], INITIAL_NOISE, SHAPE)
    bar = sampler.schedule.alphas_cumprod[999]
    expected = (x - np.sqrt(1 - bar) * network(x, torch.tensor(999))) / np.sqrt(bar)
    torch.testing.assert_close(first.x0, expected.clamp(-1, 1).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_encoding_inverts_sampling_better_with_more_steps(prediction_type, fake_network):
    network = fake_network(prediction_type=prediction_type)
    images = seeded_noise([1, 2], 7, SHAPE).clamp(-1, 1) * 0.8
    errors = []
    for steps in (10, 40, 160):
        sampler = Sampler(network, steps=steps)
        errors.append((sampler.sample(x_T=sampler.encode(images)) - images).square().mean().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.2 * errors[0]


def test_guidance_is_the_extrapolation_of_two_evaluations(fake_network):
    network = fake_network(num_classes=4)
    x = seeded_noise([0, 1], INITIAL_NOISE, SHAPE)
    sampler = Sampler(network, steps=None, spacing=[500])
    t, labels, null = torch.tensor(500), torch.tensor([1, 3]), torch.tensor([4, 4])
    eps_null, eps_label = network(x, t, null), network(x, t, labels)
    a = sampler.schedule.alphas_cumprod[500]
    expected = (x - np.sqrt(1 - a) * (eps_null + 2.5 * (eps_label - eps_null))) / np.sqrt(a)
    network.calls.clear()
    ours = sampler.sample(x_T=x, labels=[1, 3], guidance=2.5)
    assert len(network.calls) == 1
    torch.testing.assert_close(ours, expected.float().detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"steps": 0}, "steps must be"),
        ({"eta": -0.1}, r"eta must lie in \[0, 1\]"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\]"),
        ({"eta": float("nan")}, r"eta must lie in \[0, 1\]"),
        ({"eta": "big"}, r"eta must lie in \[0, 1\]"),
        ({"eta": 0.5, "solver": "unipc"}, "option of the ddim solver"),
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"engine": "warp"}, "unknown engine 'warp'"),
        ({"spacing": "ermongroup-quad", "steps": 100, "solver": "dpm-solver++"}, "without repeats"),
        ({"clip_sample_range": -1.0}, "clip_sample_range must be a positive number"),
        ({"clip_sample_range": "1"}, "clip_sample_range must be a positive number"),
        ({"steps": True}, "steps must be"),
        ({"dtype": torch.int16}, "dtype must be"),
    ],
)
def test_bad_options_are_named(options, message, fake_network):
    with pytest.raises(ValueError, match=message):
        Sampler(fake_network(), **options)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({}, "seeds or from x_T"),
        ({"seeds": [-1]}, "a seed is a whole number"),
        ({"seeds": [0], "labels": 4}, r"class 4 is out of range: the network has classes 0..3"),
        ({"seeds": [0], "labels": [1, 2]}, "2 class labels for 1 image; give one each"),
        ({"seeds": [0], "labels": [0.5]}, "whole numbers"),
        ({"seeds": [0], "guidance": 2.0}, "needs class labels"),
        ({"seeds": [0], "labels": 1, "guidance": float("inf")}, "finite"),
        ({"seeds": [0], "labels": 1, "guidance": 10**400}, "finite"),
        ({"seeds": [0], "x_T": torch.zeros(2, 3, 8, 8)}, "1 seed for 2 images in x_T"),
        ({"x_T": torch.zeros(1, 1, 8, 8)}, r"expected images of shape \(N, 3, 8, 8\)"),
        ({"seeds": [0], "batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments_are_named(arguments, message, fake_network):
    with pytest.raises(ValueError, match=message):
        Sampler(fake_network(num_classes=4), steps=2).sample(**arguments)


def test_labels_for_an_unconditional_network_are_refused(fake_network):
    with pytest.raises(ValueError, match="unconditional"):
        Sampler(fake_network(), steps=2).sample(seeds=[0], labels=1)


def test_stochastic_samplers_need_seeds_and_cannot_encode(fake_network):
    sampler = Sampler(fake_network(), steps=2, eta=1.0)
    with pytest.raises(ValueError, match="give seeds"):
        sampler.sample(x_T=torch.zeros(1, *SHAPE))
    with pytest.raises(ValueError, match="deterministic"):
        sampler.encode(torch.zeros(1, *SHAPE))


def test_no_images_are_no_error(fake_network):
    assert Sampler(fake_network(), steps=2).sample(seeds=[]).shape == (0, *SHAPE)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_same_seed_gives_the_same_bytes_in_every_batch(eta, small_unet):
    sampler = Sampler(small_unet, steps=4, eta=eta)
    labels = [i % 10 for i in range(7)]
    alone = torch.cat([sampler.sample(seeds=[s], labels=labels[s]) for s in range(7)])
    for batch_size in (2, 3, 5, 7):
        assert torch.equal(sampler.sample(seeds=range(7), labels=labels, batch_size=batch_size), alone)
    shuffled = sampler.sample(seeds=[5, 0, 3], labels=[5, 0, 3], batch_size=3)
    assert torch.equal(shuffled, alone[[5, 0, 3]])


@pytest.mark.skipif(native.module is None, reason=str(native.why_not))
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_native_operators_serve_every_step(eta, small_unet, monkeypatch):
    sampler = Sampler(small_unet, steps=3, eta=eta, clip_sample_range=1.0)
    x = seeded_noise([0, 1], INITIAL_NOISE, (3, 16, 16)).to(memory_format=torch.channels_last)
    monkeypatch.setenv("DDIM_FAST_BACKEND", "reference")
    expected = sampler.sample(seeds=[0, 1], x_T=x, labels=[3, 4], guidance=2.0)
    monkeypatch.setenv("DDIM_FAST_BACKEND", "native")  # an error, were one call to need another implementation
    ours = sampler.sample(seeds=[0, 1], x_T=x, labels=[3, 4], guidance=2.0)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_compiled_equals_eager(small_unet):
    options = {"seeds": range(5), "labels": 3, "guidance": 2.0, "batch_size": 3}
    eager = Sampler(small_unet, steps=3, clip_sample_range=1.0).sample(**options)
    compiled = Sampler(small_unet, steps=3, clip_sample_range=1.0, engine="compiled").sample(**options)
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_bfloat16_is_near_float32_and_repeats_itself(engine, small_unet):
    options = {"seeds": range(3), "labels": 3, "guidance": 2.0, "batch_size": 3}
    exact = Sampler(small_unet, steps=3, clip_sample_range=1.0).sample(**options)
    sampler = Sampler(small_unet, steps=3, clip_sample_range=1.0, engine=engine, dtype=torch.bfloat16)
    images = sampler.sample(**options)
    assert images.dtype == torch.float32
    assert (images - exact).square().mean().sqrt() < 0.03 * exact.square().mean().sqrt()
    assert torch.equal(sampler.sample(**options), images)


@pytest.mark.parametrize(
    "dtype,options",
    [
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.bfloat16, {"reuse": 2}),
        (torch.bfloat16, {"tolerance": 0.1}),
        (torch.float16, {"dtype": torch.bfloat16}),
    ],
)
def test_a_samplers_precision_is_its_own(dtype, options, small_unet):
    """Whatever torch.autocast is around its making, its calls, or each step of a trajectory."""

    def results(sampler):
        yield sampler.sample(seeds=[0, 1], labels=3, guidance=2.0)
        if sampler.tolerance is None:
            yield from (state.x for state in sampler.trajectory(seeds=[0], labels=1))
            yield sampler.encode(images)
            yield sampler.restore(measurement, blur, seeds=[0, 1])

    images, blur = torch.rand(2, 3, 16, 16), Blur((16, 16), 1.0)
    measurement = blur(images)
    options = {"steps": 2} | options
    expected = [*results(Sampler(small_unet, **options))]
    with torch.autocast("cpu", dtype):
        sampler = Sampler(small_unet, **options)
        found = []
        for result in results(sampler):
            assert torch.is_autocast_enabled("cpu")
            found.append(result)
    for result, other in zip(found, expected, strict=True):
        assert result.dtype == torch.float32 and torch.equal(result, other)


def test_samplers_of_one_denoiser_share_its_weights(small_unet):
    class Allocations(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.numbers += sum(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    denoiser = Denoiser(small_unet)
    images = Sampler(denoiser, steps=3).sample(seeds=[0])
    with Allocations() as made:
        second = Sampler(denoiser, steps=3)
    assert made.numbers == 0
    assert torch.equal(second.sample(seeds=[0]), images) and torch.equal(Sampler(small_unet, steps=3).sample(seeds=[0]), images)
    assert Sampler(denoiser, steps=2, solver="unipc").denoiser is denoiser


def test_a_model_may_be_a_name_or_a_path(small_unet, tmp_path):
    small_unet.save_pretrained(tmp_path)
    request = {"seeds": [0], "labels": 1, "guidance": 2.0}
    torch.manual_seed(0)
    worse = UNet(small_unet.config)
    expected = Sampler(small_unet, steps=2, guide=worse).sample(**request)
    worse.save_pretrained(tmp_path / "worse")
    for model, guide in ((tmp_path, str(tmp_path / "worse")), (str(tmp_path), tmp_path / "worse")):
        assert torch.equal(Sampler(model, steps=2, guide=guide).sample(**request), expected)
    assert torch.equal(Sampler(Denoiser(tmp_path, guide=worse), steps=2).sample(**request), expected)
    assert Sampler("fashion-mnist").image_shape == (1, 32, 32)
    for options in ({"model": "no-such-model"}, {"model": tmp_path, "guide": "no-such-model"}):
        with pytest.raises(FileNotFoundError, match="unknown model 'no-such-model'"):
            Sampler(**options)


@pytest.mark.gpu
def test_a_guide_by_name_is_put_beside_the_model():
    model = UNet.from_pretrained("cifar10-64").cuda()
    for network in Sampler(model, guide="cifar10-small").networks:
        assert network.device.type == "cuda"


@pytest.mark.parametrize(
    "options,shown",
    [
        ({}, "Sampler(Denoiser(FakeNetwork 3x8x8, float32, cpu), ddim, 20 steps quadratic, eta 0.0, eager)"),
        (
            {"solver": "unipc", "spacing": [9, 5, 0], "steps": None, "dtype": torch.bfloat16},
            "Sampler(Denoiser(FakeNetwork 3x8x8, bfloat16, cpu), unipc, 3 steps listed, eager)",
        ),
        ({"tolerance": 0.05}, "Sampler(Denoiser(FakeNetwork 3x8x8, float32, cpu), ddim, tolerance 0.05, eta 0.0, eager)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*may be slow")
def test_a_sampler_shows_itself_on_one_line(options, shown, fake_network):
    assert repr(Sampler(fake_network(), **options)) == shown


def test_a_sampler_shows_its_guide_and_what_it_reuses(small_unet):
    shown = repr(Sampler(small_unet, steps=4, guide=small_unet, eta=0.5, reuse=2, engine="compiled"))
    denoiser = "Denoiser(UNet 3x16x16, float32, cpu, guide UNet)"
    assert shown == f"Sampler({denoiser}, ddim, 4 steps quadratic, eta 0.5, reuse 2, compiled)"


@pytest.mark.parametrize("option", [{"dtype": torch.bfloat16}, {"guide": object()}, {"batch_invariant": False}])
def test_options_of_a_shared_denoiser_are_its_own(option, small_unet):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is an option of the Denoiser"):
        Sampler(Denoiser(small_unet), **option)
