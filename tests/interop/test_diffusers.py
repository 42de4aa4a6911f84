"""The fast schedulers beside diffusers' own: the same bits, wherever theirs is defined; and what only ours can do."""

# ruff: noqa: E402 - without diffusers there is nothing to import

import copy
import doctest
import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from diffusers import DDIMInverseScheduler, DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel

import ddim_fast.interop.diffusers as interop
from ddim_fast import NoiseSchedule, Sampler, select_timesteps
from ddim_fast.diffusion.step import step_coefficients
from ddim_fast.interop.diffusers import FastDDIMInverseScheduler, FastDDIMScheduler

TYPES = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]
LIMITS = {
    "free": {"clip_sample": False},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.7},
    "thresholded": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
}
SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero-snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "own-betas": {"trained_betas": np.linspace(1e-4, 0.05, 500), "num_train_timesteps": 500},
    "alpha-not-one": {"set_alpha_to_one": False, "beta_start": 0.01},
}


def images(seed: int = 0, shape: tuple[int, ...] = (3, 2, 5, 7), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def network(x: Tensor, t: int | Tensor) -> Tensor:
    """A formula that does not shrink what it is given, so that differences would show."""
    return torch.sin(1.7 * x) + 0.6 * x.roll(1, -1) + 0.3 * (int(t) / 1000)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def assert_loops_agree(ours, theirs, steps: int = 9, **options) -> None:
    """Runs both from one noise; ``options`` go to step(), generators as seeds."""
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.num_inference_steps == theirs.num_inference_steps
    seed = options.pop("seed", None)
    generators = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
    x = y = images()
    for t in theirs.timesteps:
        x, x0 = ours.step(network(x, t), t, x, **options, **_generator(generators[0]), return_dict=False)
        y, y0 = theirs.step(network(y, t), t, y, **options, **_generator(generators[1]), return_dict=False)
        assert_same(x, y)
        assert_same(x0, y0)


def _generator(generator) -> dict:
    return {} if generator is None else {"generator": generator}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_loops_have_the_same_bits(prediction_type, spacing, limit):
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing, **LIMITS[limit]}
    for options in ({}, {"use_clipped_model_output": True}, {"eta": 0.4, "seed": 3}, {"eta": 1.0, "seed": 4}):
        assert_loops_agree(FastDDIMScheduler(**config), DDIMScheduler(**config), **options)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_has_the_same_bits(schedule, prediction_type):
    config = {**SCHEDULES[schedule], "prediction_type": prediction_type}
    assert_loops_agree(FastDDIMScheduler(**config), DDIMScheduler(**config), steps=13)
    assert_loops_agree(FastDDIMScheduler(**config), DDIMScheduler(**config), steps=100, eta=0.5, seed=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 61, 333, 999, 1000])  # diffusers' "trailing" has a 62nd of 61, t = -1
def test_every_number_of_steps_has_the_same_timesteps_and_bits(steps):
    for spacing in SPACINGS:
        ours, theirs = (kind(timestep_spacing=spacing) for kind in (FastDDIMScheduler, DDIMScheduler))
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        for t in (*ours.timesteps[:3], *ours.timesteps[-3:]):
            assert_same(*(s.step(images(1), t, images(), return_dict=False)[0] for s in (ours, theirs)))


@pytest.mark.parametrize("prediction_type", TYPES)
def test_timesteps_come_in_any_order_and_form(prediction_type):
    ours, theirs = (kind(prediction_type=prediction_type) for kind in (FastDDIMScheduler, DDIMScheduler))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    # Twice the same, from the middle, unlisted ones, the ends; as numbers, tensors of one and of no dimension.
    for t in (500, 500, torch.tensor(300), 300, 7, np.int64(999), torch.tensor([421]), torch.tensor(0, dtype=torch.int32), 999):
        assert_same(ours.step(images(1), t, images()).prev_sample, theirs.step(images(1), t, images()).prev_sample)


@pytest.mark.parametrize(
    "inputs", ["odd", "channels_last", "strided", "layouts differ", "broadcast", "large", "empty", "vector"]
)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_shapes_and_layouts(prediction_type, inputs):
    x, m = images(0, (2, 3, 8, 8)), images(1, (2, 3, 8, 8))
    if inputs == "odd":
        x, m = images(0, (1, 1, 3, 5)), images(1, (1, 1, 3, 5))
    elif inputs == "channels_last":
        x, m = (t.to(memory_format=torch.channels_last) for t in (x, m))
    elif inputs == "strided":
        x, m = x[..., ::2], m[..., 1::2]
    elif inputs == "layouts differ":
        m = m.to(memory_format=torch.channels_last)
    elif inputs == "broadcast":
        m = m[:1]
    elif inputs == "large":
        x, m = images(0, (40, 3, 67, 64)), images(1, (40, 3, 67, 64))
    elif inputs == "empty":
        x, m = x[:0], m[:0]
    elif inputs == "vector":
        x, m = x.flatten(), m.flatten()
    results = []
    for kind in (FastDDIMScheduler, DDIMScheduler):
        scheduler = kind(prediction_type=prediction_type)
        scheduler.set_timesteps(10)
        results.append(scheduler.step(m, 500, x, eta=0.5, variance_noise=images(2, tuple(x.shape)), return_dict=False))
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours, theirs)
        assert ours.stride() == theirs.stride() or ours.numel() == 0


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_inputs_are_left_alone(prediction_type, limit):
    scheduler = FastDDIMScheduler(prediction_type=prediction_type, **LIMITS[limit])
    scheduler.set_timesteps(10)
    for rederive in (False, True):
        inputs = [images(0), images(1), images(2)]
        sample, output, noise = (t.clone() for t in inputs)
        scheduler.step(output, 500, sample, eta=1.0, use_clipped_model_output=rederive, variance_noise=noise)
        for after, before in zip((sample, output, noise), inputs, strict=True):
            assert torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_narrow_dtypes_have_a_smaller_error(prediction_type, dtype):
    """diffusers rounds every operation, and its coefficients, to the sample's dtype."""
    x, m, z = (images(seed, (4, 3, 16, 16), dtype) for seed in range(3))
    errors = {FastDDIMScheduler: [0.0, 0.0], DDIMScheduler: [0.0, 0.0]}
    for t in range(50, 1000, 100):
        exact = _step(DDIMScheduler, prediction_type, t, m.double(), x.double(), z.double())
        for kind, sums in errors.items():
            results = _step(kind, prediction_type, t, m, x, z)
            assert [r.dtype for r in results] == [dtype, dtype]
            for i, (result, right) in enumerate(zip(results, exact, strict=True)):
                sums[i] += ((result - right).norm() / right.norm()).item()
    (ours, ours_x0), (theirs, theirs_x0) = errors.values()
    assert ours < 0.8 * theirs
    assert ours_x0 < 0.8 * theirs_x0 if prediction_type != "sample" else ours_x0 == theirs_x0 == 0


def _step(kind, prediction_type, t, output, sample, noise):
    scheduler = _set(kind(prediction_type=prediction_type, clip_sample=False))
    return scheduler.step(output, t, sample, eta=0.5, variance_noise=noise, return_dict=False)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_float64_has_the_same_bits(prediction_type):
    config = {"prediction_type": prediction_type}
    inputs = images(1).double(), 300, images().double()
    ours, theirs = (_set(kind(**config)).step(*inputs, return_dict=False) for kind in (FastDDIMScheduler, DDIMScheduler))
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float64", "float32")], ids="-".join)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_mixed_dtypes_give_the_dtypes_of_diffusers(prediction_type, dtypes):
    x, m = (images(seed, dtype=getattr(torch, name)) for seed, name in enumerate(dtypes))
    results = []
    for kind in (FastDDIMScheduler, DDIMScheduler):
        scheduler = kind(prediction_type=prediction_type)
        scheduler.set_timesteps(10)
        generator = torch.Generator().manual_seed(0)
        results.append(scheduler.step(m, 300, x, eta=0.5, generator=generator, return_dict=False))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_noise_comes_from_generators_as_in_diffusers():
    def step(kind, generator):
        scheduler = kind()
        scheduler.set_timesteps(10)
        return scheduler.step(images(1), 500, images(), eta=0.8, generator=generator).prev_sample

    def one():
        return torch.Generator().manual_seed(5)

    def several():
        return [torch.Generator().manual_seed(i) for i in range(len(images()))]

    for make in (one, several):
        assert_same(step(FastDDIMScheduler, make()), step(DDIMScheduler, make()))
    results = []
    for kind in (FastDDIMScheduler, DDIMScheduler):
        torch.manual_seed(9)
        results.append(step(kind, None))
    assert_same(*results)


def test_each_eta_has_its_own_step():
    ours, theirs = _set(FastDDIMScheduler()), _set(DDIMScheduler())
    for eta in (0.0, 0.5, 1.0, 0.5, 0):
        noise = images(2) if eta else None
        results = [s.step(images(1), 500, images(), eta=eta, variance_noise=noise).prev_sample for s in (ours, theirs)]
        assert_same(*results)


def test_results_come_in_both_forms():
    scheduler = FastDDIMScheduler()
    scheduler.set_timesteps(10)
    named = scheduler.step(images(1), 500, images())
    assert type(named) is type(_set(DDIMScheduler()).step(images(1), 500, images()))
    x, x0 = scheduler.step(images(1), 500, images(), return_dict=False)
    assert torch.equal(named.prev_sample, x) and torch.equal(named.pred_original_sample, x0)


def _set(scheduler, steps: int = 10, **options):
    scheduler.set_timesteps(steps, **options)
    return scheduler


@pytest.mark.parametrize("prediction_type", TYPES)
def test_gradients_are_those_of_diffusers(prediction_type):
    gradients = []
    for kind in (FastDDIMScheduler, DDIMScheduler):
        scheduler = _set(kind(prediction_type=prediction_type))
        x, m = images().requires_grad_(), images(1).requires_grad_()
        moved, x0 = scheduler.step(m, 300, x, return_dict=False)
        (moved.square().sum() + x0.sin().sum()).backward()
        gradients.append((x.grad, m.grad))
    for ours, theirs in zip(*gradients, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class TestDevice:
    """Timesteps on the meta device can have no value read from them: what a GPU would make us wait for is an error there."""

    @pytest.mark.parametrize("inference", [False, True])
    @pytest.mark.parametrize("compat", ["diffusers", "exact"])
    def test_steps_read_nothing_from_the_device(self, compat, inference):
        expected = _set(DDIMScheduler())
        scheduler = FastDDIMScheduler(compat=compat)
        with torch.inference_mode(inference):
            scheduler.set_timesteps(10, device="meta")
            assert scheduler.timesteps.device.type == "meta"
            start = 4  # as image-to-image pipelines do
            x = y = scheduler.add_noise(images(), images(1), expected.timesteps[start : start + 1])
            for t, number in zip(scheduler.timesteps[start:], expected.timesteps[start:].tolist(), strict=True):
                x = scheduler.step(network(x, number), t, x, eta=0.5, variance_noise=images(2)).prev_sample
                y = expected.step(network(y, number), number, y, eta=0.5, variance_noise=images(2)).prev_sample
                assert_same(x, y)
            again = scheduler.timesteps[2]
            assert_same(scheduler.step(images(1), again, images())[0], expected.step(images(1), 700, images())[0])

    def test_the_inverse_reads_nothing_either(self):
        scheduler, expected = FastDDIMInverseScheduler(), _set(DDIMInverseScheduler())
        scheduler.set_timesteps(10, device="meta")
        for t, number in zip(scheduler.timesteps, expected.timesteps.tolist(), strict=True):
            assert_same(scheduler.step(images(1), t, images())[0], expected.step(images(1), number, images())[0])

    def test_diffusers_does_read(self):
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(10, device="meta")
        with pytest.raises(RuntimeError, match="meta"):
            scheduler.step(images(1), scheduler.timesteps[0], images())

    def test_what_is_not_of_the_list_is_read(self):
        scheduler = FastDDIMScheduler()
        scheduler.set_timesteps(10, device="meta")
        with pytest.raises(RuntimeError, match="meta"):
            scheduler.step(images(1), scheduler.timesteps[:1].to(torch.int32), images())

    @pytest.mark.gpu
    @pytest.mark.parametrize("prediction_type", TYPES)
    def test_steps_do_not_wait_for_a_gpu(self, prediction_type):
        scheduler, expected = FastDDIMScheduler(prediction_type=prediction_type), DDIMScheduler(prediction_type=prediction_type)
        for s in (scheduler, expected):
            s.set_timesteps(10, device="cuda")
        x = start = scheduler.add_noise(images().cuda(), images(1).cuda(), scheduler.timesteps[:1])
        output = images(2).cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in scheduler.timesteps:
                x = scheduler.step(output, t, x).prev_sample
        finally:
            torch.cuda.set_sync_debug_mode("default")
        y = start
        for t in expected.timesteps:
            y = expected.step(output, t, y).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_levels_that_are_replaced_count():
    ours, theirs = _set(FastDDIMScheduler()), _set(DDIMScheduler())
    for change in ("alphas_cumprod", "final_alpha_cumprod"):
        ours.step(images(1), 50, images())
        for scheduler in (ours, theirs):
            setattr(scheduler, change, getattr(scheduler, change) * 0.9)
        for t in (500, 50):
            assert_same(ours.step(images(1), t, images())[0], theirs.step(images(1), t, images())[0])


def test_a_copy_is_a_scheduler_of_its_own():
    scheduler = _set(FastDDIMScheduler(compat="exact", timestep_spacing="trailing"), 7)
    before = scheduler.step(images(1), scheduler.timesteps[2], images())[0]
    other = copy.deepcopy(scheduler)
    scheduler.set_timesteps(20)
    assert_same(other.step(images(1), other.timesteps[2], images())[0], before)


def test_the_rest_of_the_interface():
    ours, theirs = FastDDIMScheduler(), DDIMScheduler()
    assert isinstance(ours, DDIMScheduler) and (len(ours), ours.order, ours.init_noise_sigma) == (1000, 1, 1.0)
    assert torch.equal(ours.timesteps, theirs.timesteps) and ours.num_inference_steps is None
    assert ours.scale_model_input(x := images(), 5) is x
    t = torch.tensor([3, 500, 999])
    assert_same(ours.add_noise(images(), images(1), t), theirs.add_noise(images(), images(1), t))
    assert_same(ours.get_velocity(images(), images(1), t), theirs.get_velocity(images(), images(1), t))
    for pair in ((420, 400), (980, 960), (999, 998), (0, -1)):
        assert_same(ours._get_variance(*pair), theirs._get_variance(*pair))


class TestExact:
    """compat="exact": the next timestep is that of the run."""

    def next_timesteps(self, scheduler) -> list[int]:
        """Where each step leads, found from what it does: with epsilon zero, x_0 is all there is."""
        bar = torch.cat([scheduler.alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])
        found = []
        for t in scheduler.timesteps:
            x = torch.ones(1, 1, 1, 1)
            level = (scheduler.step(torch.zeros_like(x), t, x).prev_sample.double().square() * bar[t]).item()
            found.append(int((bar - level).abs().argmin()))
        return [-1 if t == 1000 else t for t in found]

    @pytest.mark.parametrize("steps", [1, 3, 7, 30, 61])
    @pytest.mark.parametrize(
        "spacing", ["leading", "trailing", "linspace", "linear", "quadratic", "log-snr", "ermongroup-quad"]
    )
    def test_a_step_leads_to_the_next_timestep_of_the_run(self, spacing, steps):
        scheduler = _set(FastDDIMScheduler(timestep_spacing=spacing, compat="exact", clip_sample=False), steps)
        run = scheduler.timesteps.tolist()
        assert run == sorted(set(select_timesteps(NoiseSchedule.linear(), steps, spacing).tolist()), reverse=True)
        assert scheduler.num_inference_steps == len(run)
        assert self.next_timesteps(scheduler) == [*run[1:], -1]

    def test_diffusers_goes_elsewhere(self):
        run = _set(DDIMScheduler(timestep_spacing="linspace", clip_sample=False), 30)
        assert self.next_timesteps(run) != [*run.timesteps[1:].tolist(), -1]

    def test_where_both_are_right_they_are_one(self):
        for spacing, steps in (("leading", 50), ("leading", 7), ("trailing", 20)):
            exact = FastDDIMScheduler(timestep_spacing=spacing, compat="exact")
            assert_loops_agree(exact, DDIMScheduler(timestep_spacing=spacing), steps)

    @pytest.mark.parametrize("steps", [7, 50, 333, 1000])
    def test_timesteps_are_those_of_diffusers(self, steps):
        for spacing in SPACINGS:
            options = {"timestep_spacing": spacing, "steps_offset": 0 if steps == 1000 else 1}
            ours, theirs = _set(FastDDIMScheduler(**options, compat="exact"), steps), _set(DDIMScheduler(**options), steps)
            assert torch.equal(ours.timesteps, theirs.timesteps)

    @pytest.mark.parametrize("eta", [0.0, 0.7])
    @pytest.mark.parametrize("prediction_type", TYPES)
    def test_own_timesteps_are_taken_as_equation_12_says(self, prediction_type, eta):
        scheduler = FastDDIMScheduler(prediction_type=prediction_type, compat="exact", clip_sample=False)
        scheduler.set_timesteps(timesteps=[3, 900, 41, 420])
        assert scheduler.timesteps.tolist() == [900, 420, 41, 3]
        bar = [*NoiseSchedule.linear().alphas_cumprod[[900, 420, 41, 3]], 1.0]
        x, y = images(), images().double()
        for i, t in enumerate(scheduler.timesteps):
            z = images(10 + i)
            c = step_coefficients(float(bar[i]), bar[i + 1], eta, prediction_type)
            m = network(y, t)
            x0, eps = c.x0_from_sample * y + c.x0_from_output * m, c.eps_from_sample * y + c.eps_from_output * m
            y = c.prev_from_x0 * x0 + c.prev_from_eps * eps + c.sigma * z.double()
            x = scheduler.step(network(x, t), t, x, eta=eta, variance_noise=z if eta else None).prev_sample
        torch.testing.assert_close(x.double(), y, rtol=2e-4, atol=2e-4)

    def test_a_run_is_the_samplers(self, fake_network):
        model = fake_network(sample_size=8, in_channels=1)
        x = images(0, (2, 1, 8, 8))
        expected = Sampler(model, steps=12, spacing="quadratic").sample(x_T=x)
        scheduler = _set(FastDDIMScheduler(timestep_spacing="quadratic", compat="exact", clip_sample=False), 12)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t[None]), t, x).prev_sample
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)

    def test_a_timestep_beside_the_run_goes_to_the_next_smaller_one(self):
        scheduler = FastDDIMScheduler(compat="exact")
        scheduler.set_timesteps(timesteps=[800, 400, 100])
        for t, end in ((900, 800), (800, 400), (500, 400), (101, 100)):
            # diffusers' step between the two noise levels, from timestep 1 to 0
            theirs = DDIMScheduler()
            theirs.alphas_cumprod = scheduler.alphas_cumprod[[end, t]]
            theirs.num_inference_steps = 1000
            expected = theirs.step(images(1), 1, images()).prev_sample
            assert_same(scheduler.step(images(1), t, images()).prev_sample, expected)

    def test_there_and_back(self):
        """Where the prediction does not change, inversion undoes sampling exactly, up to rounding."""
        options = {"timestep_spacing": "quadratic", "compat": "exact", "clip_sample": False}
        there, back = _set(FastDDIMInverseScheduler(**options), 15), _set(FastDDIMScheduler(**options), 15)
        assert torch.equal(there.timesteps.flip(0), back.timesteps)
        eps, x = images(1), images()
        for t in there.timesteps:
            x = there.step(eps, t, x).prev_sample
        for t in back.timesteps:
            x = back.step(eps, t, x).prev_sample
        torch.testing.assert_close(x, images(), rtol=1e-3, atol=1e-3)


FINITE = {
    **SCHEDULES,
    "cosine, zero-snr": {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
    "scaled, zero-snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    "a level twice": {"trained_betas": [0.0, 0.0, *np.linspace(1e-3, 0.2, 198)], "num_train_timesteps": 200},
    "noise alone": {"trained_betas": [*np.linspace(1e-4, 0.9, 199), 1.0], "num_train_timesteps": 200},
}


class TestWhatIsNotFinite:
    """compat="exact" is right or an error that says why; compat="diffusers" is diffusers', and says so."""

    # What each prediction cannot determine.
    REASONS = {"epsilon": "at zero SNR", "sample": "without noise"}  # noqa: RUF012

    @pytest.mark.parametrize("prediction_type", TYPES)
    @pytest.mark.parametrize("schedule", FINITE)
    def test_every_exact_step_is_equation_12(self, schedule, prediction_type):
        x0, eps, z = 0.7, -1.3, 0.4
        for spacing, steps, eta in ((s, n, e) for s in SPACINGS for n in (1, 3, 20, 133) for e in (0.0, 0.5, 1.0)):
            options = {"timestep_spacing": spacing, "prediction_type": prediction_type, "compat": "exact", "clip_sample": False}
            scheduler = FastDDIMScheduler(**FINITE[schedule] | options)
            levels = scheduler.alphas_cumprod.double().tolist()
            scheduler.set_timesteps(steps)
            run = scheduler.timesteps.tolist()
            ends = [*(levels[t] for t in run[1:]), float(scheduler.final_alpha_cumprod)]
            for t, b in [*zip(run, ends, strict=True)][:: max(1, len(run) // 12)]:
                a = levels[t]
                x = a**0.5 * x0 + (1 - a) ** 0.5 * eps
                output = {"epsilon": eps, "sample": x0, "v_prediction": a**0.5 * eps - (1 - a) ** 0.5 * x0}[prediction_type]
                arguments = torch.full((1,), output), t, torch.full((1,), x), eta
                undetermined = (prediction_type, a) in (("epsilon", 0.0), ("sample", 1.0))
                if undetermined:
                    with pytest.raises(ValueError, match=self.REASONS[prediction_type]):
                        scheduler.step(*arguments, variance_noise=torch.full((1,), z))
                    continue
                result = scheduler.step(*arguments, variance_noise=torch.full((1,), z)).prev_sample.item()
                sigma = 0.0 if a == b else eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
                right = b**0.5 * x0 + max(0.0, 1 - b - sigma**2) ** 0.5 * eps + sigma * z
                lost = (b / a) ** 0.5 if prediction_type == "epsilon" else ((1 - b) / (1 - a)) ** 0.5 if a < 1 else 0
                assert abs(result - right) < 1e-5 + 1e-6 * lost, (spacing, steps, eta, t, result, right)

    @pytest.mark.parametrize(
        "options",
        [{"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}],
        ids=["cosine", "zero-snr"],
    )
    def test_runs_that_are_nan_in_diffusers_are_finite(self, options):
        options = {**options, "timestep_spacing": "trailing"}
        theirs, ours = (
            self.runs(kind, options | extra) for kind, extra in ((DDIMScheduler, {}), (FastDDIMScheduler, {"compat": "exact"}))
        )
        assert not all(theirs) and all(ours)

    def runs(self, kind, options) -> list[bool]:
        """For some numbers of steps, whether the first step is finite."""
        finite = []
        for steps in range(2, 40):
            scheduler = _set(kind(**options), steps)
            x = scheduler.step(images(1), scheduler.timesteps[0], images(), eta=1.0, variance_noise=images(2)).prev_sample
            finite.append(bool(x.isfinite().all()))
        return finite

    CASES = {  # noqa: RUF012
        "rounding": (
            FastDDIMScheduler,
            {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
            1.0,
            "below zero",
        ),
        "zero SNR": (
            FastDDIMScheduler,
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False},
            0.0,
            "at zero SNR.* take a network",
        ),
        "no noise": (
            FastDDIMInverseScheduler,
            {"prediction_type": "sample"},
            None,
            "without noise.* take set_alpha_to_one=False",
        ),
        "no noise before": (
            FastDDIMScheduler,
            {"trained_betas": [0.0, *np.linspace(1e-3, 0.1, 99)], "num_train_timesteps": 100, "prediction_type": "sample"},
            0.0,
            "without noise",
        ),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_diffusers_numbers_stay_and_are_warned_of_once(self, case):
        kind, options, eta, reason = self.CASES[case]
        their_kind = kind.__mro__[2]
        extra = {} if eta is None else {"eta": eta, "variance_noise": images(2) if eta else None}
        found = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for steps in range(2, 40):
                ours, theirs = _set(kind(**options), steps), _set(their_kind(**options), steps)
                for t in (ours.timesteps[0], ours.timesteps[-1]):
                    results = [s.step(images(1), t, images(), **extra, return_dict=False) for s in (ours, theirs)]
                    for a, b in zip(*results, strict=True):
                        assert_same(a, b)
                    ours.step(images(1), t, images(), **extra)  # once more
                    found.append(not all(r.isfinite().all() for r in results[1]))
        broken = {i // 2 for i, broken in enumerate(found) if broken}
        assert broken and len(caught) == len(broken)
        assert all(re.search(reason, str(w.message)) and w.filename == __file__ for w in caught)

    def test_no_noise_is_an_error_that_says_what_to_do(self):
        inverse = _set(FastDDIMInverseScheduler(prediction_type="sample", compat="exact"))
        with pytest.raises(ValueError, match="take set_alpha_to_one=False"):
            inverse.step(images(1), inverse.timesteps[0], images())
        inverse = _set(FastDDIMInverseScheduler(prediction_type="sample", compat="exact", set_alpha_to_one=False))
        for t in inverse.timesteps:
            assert inverse.step(images(1), t, images()).prev_sample.isfinite().all()

    @pytest.mark.parametrize("eta", [1.5, -0.1, float("nan")])
    def test_eta_beyond_its_range(self, eta):
        scheduler = _set(FastDDIMScheduler(compat="exact"))
        with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]; got"):
            scheduler.step(images(1), 500, images(), eta=eta)


class TestInverse:
    @pytest.mark.parametrize("spacing", ["leading", "trailing"])
    @pytest.mark.parametrize("prediction_type", TYPES)
    def test_loops_have_the_same_bits(self, prediction_type, spacing):
        for limit in ("free", "clipped"):
            config = {"prediction_type": prediction_type, "timestep_spacing": spacing, **LIMITS[limit]}
            for steps in (1, 9, 50):
                assert_loops_agree(FastDDIMInverseScheduler(**config), DDIMInverseScheduler(**config), steps)

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_every_schedule_has_the_same_bits(self, schedule):
        for prediction_type in TYPES:
            config = {**SCHEDULES[schedule], "prediction_type": prediction_type}
            assert_loops_agree(FastDDIMInverseScheduler(**config), DDIMInverseScheduler(**config), 13)

    def test_it_ignores_what_diffusers_ignores(self):
        config = DDIMScheduler(thresholding=True, sample_max_value=1.5).config
        ours, theirs = FastDDIMInverseScheduler.from_config(config), DDIMInverseScheduler.from_config(config)
        assert_loops_agree(ours, theirs)
        with pytest.warns(FutureWarning, match="set_alpha_to_zero"):
            old = FastDDIMInverseScheduler(set_alpha_to_zero=False)
        assert old.initial_alpha_cumprod == old.alphas_cumprod[0]

    def test_configs_of_forward_schedulers_fit_without_a_warning(self, caplog):
        config = FastDDIMScheduler(thresholding=True, sample_max_value=1.5, steps_offset=1, compat="exact").config
        inverse = FastDDIMInverseScheduler.from_config(config)
        assert (inverse.config.steps_offset, inverse.config.compat) == (1, "exact")
        assert isinstance(inverse, DDIMInverseScheduler) and not caplog.records

    def test_results_are_of_diffusers_class(self):
        ours, theirs = (
            _set(kind()).step(images(1), 500, images()) for kind in (FastDDIMInverseScheduler, DDIMInverseScheduler)
        )
        assert type(ours) is type(theirs)
        assert_same(ours.pred_original_sample, theirs.pred_original_sample)


def _step_unset(kind):
    kind().step(images(1), 500, images())


SAME_ERRORS = {
    "too many steps": lambda kind: kind().set_timesteps(1001),
    "no timesteps set": _step_unset,
    "unknown spacing": lambda kind: kind(timestep_spacing="log").set_timesteps(10),
    "unknown prediction": lambda kind: _set(kind(prediction_type="eps")).step(images(1), 500, images()),
    "generator and noise": lambda kind: _set(kind()).step(
        images(1), 500, images(), eta=1.0, generator=torch.Generator(), variance_noise=images(2)
    ),
}


@pytest.mark.parametrize("mistake", SAME_ERRORS)
def test_errors_are_those_of_diffusers(mistake):
    messages = []
    for kind in (FastDDIMScheduler, DDIMScheduler):
        with pytest.raises(ValueError) as caught:
            SAME_ERRORS[mistake](kind)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    with pytest.raises(NotImplementedError, match="sigmoid is not implemented"):
        FastDDIMScheduler(beta_schedule="sigmoid")


@pytest.mark.parametrize("kind", [FastDDIMScheduler, FastDDIMInverseScheduler])
def test_errors_of_our_own(kind):
    cases = [
        (lambda: kind(compat="fast"), "compat must be 'diffusers' or 'exact'; got 'fast'"),
        (lambda: kind().set_timesteps(timesteps=[5, 3]), "timesteps of one's own needs compat='exact'"),
        (lambda: kind(timestep_spacing="quadratic").set_timesteps(5), "timestep_spacing = 'quadratic' needs compat='exact'"),
        (lambda: kind().set_timesteps(), "give num_inference_steps or timesteps, one of them; got None and None"),
        (lambda: kind(compat="exact").set_timesteps(2, timesteps=[5, 3]), r"one of them; got 2 and \[5, 3\]"),
        (lambda: kind().set_timesteps(0), "num_inference_steps must be at least 1; got 0"),
        (lambda: kind(compat="exact").set_timesteps(1001), "from 1 to 1000, .*; got 1001"),
        (lambda: kind(compat="exact").set_timesteps(timesteps=[5, 1000]), r"timesteps must lie in 0..999; got 5..1000"),
        (lambda: kind(compat="exact", steps_offset=1).set_timesteps(1000), "steps_offset = 1 moves the timestep 1000 beyond"),
        (lambda: kind(compat="exact", timestep_spacing="log").set_timesteps(9), "unknown spacing 'log'"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="you need to run 'set_timesteps'"):
        kind(compat="exact").step(images(1), 5, images())


class TestConfigs:
    def test_configs_pass_both_ways_silently(self, caplog):
        theirs = DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, trained_betas=None, clip_sample=False)
        ours = FastDDIMScheduler.from_config(theirs.config)
        back = DDIMScheduler.from_config(ours.config)
        assert type(back) is DDIMScheduler and not caplog.records
        for key, value in theirs.config.items():
            if not key.startswith("_"):
                assert ours.config[key] == back.config[key] == value
        assert ours.config.compat == "diffusers"
        exact = FastDDIMScheduler.from_config(theirs.config, compat="exact")
        assert exact.config.compat == "exact" and exact.config.steps_offset == 1
        # Another scheduler in between forgets nothing.
        between = diffusers.EulerDiscreteScheduler.from_config(exact.config)
        assert FastDDIMScheduler.from_config(between.config).config.compat == "exact"

    @pytest.mark.parametrize("kind", [FastDDIMScheduler, FastDDIMInverseScheduler])
    def test_a_saved_scheduler_loads_as_it_was(self, kind, tmp_path):
        scheduler = kind(
            num_train_timesteps=100, prediction_type="v_prediction", timestep_spacing="quadratic", compat="exact", beta_end=0.1
        )
        scheduler.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == kind.__name__
        loaded = kind.from_pretrained(tmp_path)
        assert {k: v for k, v in scheduler.config.items() if k != "_use_default_values"} == dict(loaded.config)
        results = [_set(s, 8).step(images(1), s.timesteps[3], images()).prev_sample for s in (scheduler, loaded)]
        assert_same(*results)

    def test_positional_arguments_are_those_of_diffusers(self):
        arguments = (100, 0.001, 0.03, "linear", None, False, False, 1, "sample")
        ours, theirs = FastDDIMScheduler(*arguments), DDIMScheduler(*arguments)
        assert {k: ours.config[k] for k in theirs.config if k[0] != "_"} == {
            k: v for k, v in theirs.config.items() if k[0] != "_"
        }
        assert_same(ours.alphas_cumprod, theirs.alphas_cumprod)

    def test_a_config_passes_through_every_compatible_scheduler(self):
        config = FastDDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, compat="exact", clip_sample=False).config
        passed = 0
        for kind in FastDDIMScheduler().compatibles:
            try:
                between = kind.from_config(config)
            except ImportError:  # it needs a library that is not installed
                continue
            after = FastDDIMScheduler.from_config(between.config).config
            own = {name: value for name, value in config.items() if not name.startswith("_")}
            assert {name: after[name] for name in own} == own, kind
            passed += 1
        assert passed > 5

    def test_compatible_schedulers_are_those_of_diffusers(self):
        assert set(FastDDIMScheduler().compatibles) == set(DDIMScheduler().compatibles)
        assert DDIMInverseScheduler in FastDDIMInverseScheduler().compatibles


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


class TestPipelines:
    def run(self, pipe, **options) -> np.ndarray:
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(1), output_type="np", **options
        ).images

    @pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"use_clipped_model_output": True}], ids=str)
    def test_one_line_changes_and_no_image(self, unet, options):
        pipe = DDIMPipeline(unet, DDIMScheduler())
        before = self.run(pipe, **options)
        pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)
        np.testing.assert_array_equal(self.run(pipe, **options), before)

    def test_a_saved_pipeline_loads_with_its_scheduler(self, unet, tmp_path):
        pipe = DDPMPipeline(unet, FastDDIMScheduler(compat="exact", timestep_spacing="quadratic"))
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["scheduler"] == ["ddim_fast.interop.diffusers", "FastDDIMScheduler"]
        for kind in (DiffusionPipeline, DDPMPipeline):
            loaded = kind.from_pretrained(tmp_path)
            assert type(loaded) is DDPMPipeline and type(loaded.scheduler) is FastDDIMScheduler
            assert loaded.scheduler.config.compat == "exact"
            np.testing.assert_array_equal(self.run(loaded), self.run(pipe))

    def test_ddim_pipeline_needs_it_again_after_loading(self, unet, tmp_path):
        """It converts what it is given; the configuration comes through."""
        pipe = DDIMPipeline(unet, DDIMScheduler())
        pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config, compat="exact", timestep_spacing="trailing")
        pipe.save_pretrained(tmp_path)
        loaded = DDIMPipeline.from_pretrained(tmp_path)
        assert type(loaded.scheduler) is DDIMScheduler
        loaded.scheduler = FastDDIMScheduler.from_config(loaded.scheduler.config)
        assert loaded.scheduler.config.compat == "exact"
        np.testing.assert_array_equal(self.run(loaded), self.run(pipe))

    def test_the_example_of_the_module(self, unet, tmp_path):
        DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
        results = doctest.testmod(interop, extraglobs={"folder": str(tmp_path)})
        assert results.failed == 0 and results.attempted >= 6


def test_without_diffusers_it_says_what_to_install():
    code = "import sys; sys.modules['diffusers'] = None\nimport ddim_fast.interop.diffusers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ImportError: ddim_fast.interop.diffusers needs diffusers" in done.stderr and "pip install diffusers" in done.stderr


def test_no_step_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (FastDDIMScheduler, FastDDIMInverseScheduler):
            _set(kind()).step(images(1), 500, images())
