"""Deep features that several steps share: which they are, that every engine does the same, and that nothing else changes."""

import pytest
import torch

from ddim_fast import NoiseSchedule, Sampler, UNet, UNetConfig, fast_ddim_step

OPTIONS = {"steps": 6, "spacing": "trailing"}
REQUEST = {"seeds": [3, 1, 2], "labels": [0, 3, 9], "guidance": 2.5}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("multipliers,attention", [((1,), ()), ((1, 2), (8,)), ((1, 2, 2), (4,))])
def test_a_network_given_its_own_deep_features_predicts_the_same(multipliers, attention, layers):
    config = UNetConfig(
        sample_size=8,
        base_channels=8,
        norm_num_groups=4,
        channel_multipliers=multipliers,
        attention_resolutions=attention,
        layers_per_block=layers,
    )
    torch.manual_seed(0)
    model = UNet(config).eval()
    for p in model.parameters():
        if not p.any():  # the zeros of a fresh network would hide what is reused
            torch.nn.init.normal_(p, std=0.05)
    x, other = torch.randn(2, 2, 3, 8, 8)
    with torch.no_grad():
        condition, later = model.condition(torch.tensor(900)), model.condition(torch.tensor(100))
        prediction, deep = model.denoise_reusing(x, condition)
        assert torch.equal(prediction, model(x, torch.tensor(900)))
        again, same = model.denoise_reusing(x, condition, deep)
        assert torch.equal(again, prediction) and same is deep
        # Images, condition and deep features each have a part in a prediction.
        reused = model.denoise_reusing(other, later, deep)[0]
        assert not torch.equal(reused, model.denoise(other, later))
        assert not torch.equal(reused, model.denoise_reusing(x, later, deep)[0])
        assert not torch.equal(reused, model.denoise_reusing(other, condition, deep)[0])


@pytest.mark.parametrize("reuse", [2, 3])
def test_a_run_is_the_loop_in_plain_words(reuse, small_unet):
    """Guided and stochastic; deep features computed in steps 0, N, 2 N, ... only, and extrapolated between."""
    seeds, labels, guidance = REQUEST["seeds"], torch.tensor(REQUEST["labels"]), REQUEST["guidance"]
    x = x_T = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    computed = {}
    sampler = Sampler(small_unet, **OPTIONS, eta=1.0, reuse=reuse)
    images = sampler.sample(x_T=x_T, **REQUEST)
    levels = [*NoiseSchedule.from_config(small_unet.config).alphas_cumprod[sampler.timesteps], 1.0]
    both = torch.cat([torch.full((3,), 10), labels])
    for i, t in enumerate(sampler.timesteps):
        with torch.no_grad():
            condition = small_unet.condition(torch.tensor(t).expand(6), both)
            if i in (0, reuse, 2 * reuse):
                output, computed[i] = small_unet.denoise_reusing(torch.cat([x, x]), condition)
            else:
                last = max(computed)
                change = 0 if last == 0 else computed[last] - computed[last - reuse]
                deep = computed[last] + (i - last) / reuse * change
                output, _ = small_unet.denoise_reusing(torch.cat([x, x]), condition, deep)
        none, labelled = output.chunk(2)
        x = fast_ddim_step(
            x,
            labelled,
            levels[i],
            levels[i + 1],
            eta=1.0,
            seeds=seeds,
            step=i,
            prediction_type="v_prediction",
            unconditional_output=none,
            guidance=guidance,
        )
    torch.testing.assert_close(images, x, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(images, Sampler(small_unet, **OPTIONS, eta=1.0).sample(x_T=x_T, **REQUEST), atol=1e-2)


@pytest.mark.parametrize("reuse", [2, 3])
@pytest.mark.parametrize(
    "engine,device",
    [
        pytest.param("compiled", "cpu", marks=pytest.mark.slow),
        ("captured", "cpu"),
        pytest.param("captured", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_engines_agree(engine, device, reuse, small_unet):
    model = small_unet.to(device)
    eager = Sampler(model, **OPTIONS, reuse=reuse)
    other = Sampler(model, **OPTIONS, reuse=reuse, engine=engine)
    images = other.sample(**REQUEST)
    torch.testing.assert_close(images, eager.sample(**REQUEST), atol=1e-4, rtol=1e-4)
    # The same compiled code, or graph, keeps nothing of one batch for the next.
    new = {"seeds": [7, 8, 9], "labels": [2, 2, 0], "guidance": 4.0}
    torch.testing.assert_close(other.sample(**new), eager.sample(**new), atol=1e-4, rtol=1e-4)
    assert torch.equal(other.sample(**REQUEST), images)


def test_reuse_of_one_is_none(small_unet):
    images = Sampler(small_unet, **OPTIONS, reuse=1).sample(**REQUEST)
    assert torch.equal(images, Sampler(small_unet, **OPTIONS).sample(**REQUEST))


@pytest.mark.parametrize("request_without_seeds", [{}, {"labels": 4}, {"labels": 4, "guidance": 2.0}])
def test_an_image_does_not_depend_on_its_batch(request_without_seeds, small_unet):
    sampler = Sampler(small_unet, **OPTIONS, reuse=2)
    together = sampler.sample(seeds=range(5), **request_without_seeds)
    alone = torch.cat([sampler.sample(seeds=[seed], **request_without_seeds) for seed in range(5)])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("solver", ["dpm-solver++", "unipc"])
def test_a_trajectory_ends_in_the_samples_of_any_solver(solver, small_unet):
    sampler = Sampler(small_unet, **OPTIONS, solver=solver, reuse=3)
    *_, last = sampler.trajectory(**REQUEST)
    assert last.step == 5
    assert torch.equal(last.x, sampler.sample(**REQUEST))


def test_encoding_evaluates_the_whole_network(small_unet):
    images = torch.randn(2, 3, 16, 16).clamp(-1, 1)
    ours = Sampler(small_unet, **OPTIONS, reuse=2).encode(images)
    assert torch.equal(ours, Sampler(small_unet, **OPTIONS).encode(images))


@pytest.mark.parametrize("reuse", [0, -1, 1.5, "2", True])
def test_reuse_is_a_whole_number(reuse, small_unet):
    with pytest.raises(ValueError, match=f"reuse must be a whole number of steps, 1 or more; got {reuse!r}"):
        Sampler(small_unet, reuse=reuse)


def test_other_networks_cannot_reuse(fake_network):
    with pytest.raises(ValueError, match="reuse=2 needs a network with the methods condition and denoise_reusing"):
        Sampler(fake_network(), steps=2, reuse=2)
    assert Sampler(fake_network(), steps=2, reuse=1).sample(seeds=[0]).shape == (1, 3, 8, 8)
