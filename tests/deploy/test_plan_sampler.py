"""Sampling from a plan of native operators, without torch and without ONNX Runtime."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ddim_fast import Sampler, UNet, UNetConfig
from ddim_fast.deploy import PlanSampler
from ddim_fast.deploy.folder import PLAN, write_checksums
from ddim_fast.deploy.plan_export import export_plan
from ddim_fast.ops import native

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.why_not))

SEEDS, LABELS = [5, 2**62 + 7, 0, 9], [3, 2, 9, 3]
OPTIONS = {"steps": 4, "solver": "unipc", "clip_sample_range": 1.5}


def random_unet(config):
    torch.manual_seed(0)
    model = UNet(config)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    sizes = {"base_channels": 16, "channel_multipliers": (1, 2), "layers_per_block": 1, "attention_resolutions": (8,)}
    return random_unet(UNetConfig(sample_size=16, norm_num_groups=8, num_classes=10, prediction_type="v_prediction", **sizes))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "plan"
    export_plan(folder, model, **OPTIONS, batch_size=3, source="small", command="python -m ddim_fast.export --to plan")
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """An export to be changed."""
    return shutil.copytree(folder, tmp_path / "plan")


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("labels", [None, LABELS, 7])
def test_the_same_seeds_give_the_captured_engines_bytes(labels, guidance, model, folder):
    if labels is None and guidance is not None:
        pytest.skip("guidance leads towards labels")
    sampler = PlanSampler(folder)
    request = {"seeds": SEEDS, "labels": labels, "guidance": guidance}
    captured = Sampler(model, **OPTIONS, engine="captured").sample(**request).numpy()
    found = sampler.sample(**request)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, captured, atol=1e-5)  # embeddings of several labels are products of another size
    assert np.array_equal(sampler.sample(**request), found)
    alone = [
        sampler.sample(seeds=[s], labels=None if labels is None else [np.broadcast_to(labels, 4)[i]], guidance=guidance)
        for i, s in enumerate(SEEDS)
    ]
    assert np.array_equal(np.concatenate(alone), found)


def test_each_step_may_have_a_scale_of_its_own(model, folder):
    request = {"seeds": SEEDS, "labels": 7, "guidance": [1.0, 3.0, 0.5, 2.0]}
    captured = Sampler(model, **OPTIONS, engine="captured").sample(**request).numpy()
    np.testing.assert_allclose(PlanSampler(folder).sample(**request), captured, atol=1e-4)


@pytest.mark.parametrize("solver", ["heun", "dpm-solver++3m", "consistency"])
def test_timesteps_may_lie_between_those_of_training(solver, model, tmp_path):
    options = {"steps": 4, "solver": solver, "spacing": "karras"}
    export_plan(
        tmp_path / "plan", model, **options, batch_size=3, source="small", command="python -m ddim_fast.export --to plan"
    )
    sampler, torch_sampler = PlanSampler(tmp_path / "plan"), Sampler(model, **options, engine="captured")
    assert sampler.timesteps.tolist() == torch_sampler.timesteps.tolist()
    request = {"seeds": SEEDS, "labels": 7}
    np.testing.assert_allclose(sampler.sample(**request), torch_sampler.sample(**request).numpy(), atol=1e-4)


def test_the_runs_share_their_weights(folder):
    sampler = PlanSampler(folder)
    sampler.sample(seeds=[1], labels=1, guidance=2.0)
    plain, guided = (
        {id(a) for a in run.segments} - {id(a) for a in run.inputs.values()} for run in (sampler._plain, sampler._guided)
    )
    assert len(plain & guided) > 0.9 * len(plain)


def test_nothing_of_one_request_is_left_for_the_next(model, folder):
    sampler = PlanSampler(folder)
    requests = [
        {"seeds": [1, 2, 3], "labels": [1, 2, 3], "guidance": 3.0},
        {"seeds": [1]},
        {"seeds": [4, 5], "labels": [9, 9]},
        {"x_T": np.ones((2, 3, 16, 16), np.float32), "labels": 4, "guidance": 1.5},
        {"seeds": [1, 2, 3], "labels": [1, 2, 3], "guidance": 3.0},
        {"seeds": []},
    ]
    for request in requests:
        expected = Sampler(model, **OPTIONS).sample(**request).numpy()
        np.testing.assert_allclose(sampler.sample(**request), expected, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"solver": "ddim", "eta": 0.8}, {"solver": "ddpm"}, {"spacing": [900, 400, 10], "steps": None}]
)
def test_other_samplers(options, tmp_path):
    model = random_unet(
        UNetConfig(sample_size=8, base_channels=8, channel_multipliers=(1,), layers_per_block=1, norm_num_groups=4)
    )
    options = {"steps": 3, **options}
    export_plan(tmp_path / "plan", model, **options)
    sampler = PlanSampler(tmp_path / "plan")
    expected = Sampler(model, **options)
    assert sampler.timesteps.tolist() == expected.timesteps.tolist()
    np.testing.assert_allclose(sampler.sample(seeds=SEEDS), expected.sample(seeds=SEEDS).numpy(), atol=1e-4)


@pytest.mark.skipif(not (native.module and native.module.conv3x3_has_bf16()), reason="this processor has no products of bf16")
def test_bfloat16(model, tmp_path):
    export_plan(tmp_path / "plan", model, steps=3, dtype="bfloat16")
    captured = Sampler(model, steps=3, dtype=torch.bfloat16, engine="captured").sample(seeds=SEEDS, labels=LABELS).numpy()
    sampler = PlanSampler(tmp_path / "plan")
    assert sampler.dtype == "bfloat16"
    np.testing.assert_allclose(sampler.sample(seeds=SEEDS, labels=LABELS), captured, atol=0.05)
    script = f"from ddim_fast.deploy import PlanSampler; PlanSampler({str(tmp_path / 'plan')!r})"
    result = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"DDIM_FAST_CPU": "avx2"}, capture_output=True, text=True
    )
    assert "bf16 needs a processor with AVX-512 BF16" in result.stderr


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_the_same_files_serve_lesser_processors(instruction_set, folder, tmp_path):
    script = textwrap.dedent(
        f"""
        import numpy as np
        from ddim_fast.deploy import PlanSampler
        from ddim_fast.ops import native
        sampler = PlanSampler({str(folder)!r})
        np.save({str(tmp_path / "images.npy")!r}, sampler.sample(seeds={SEEDS}, labels={LABELS}, guidance=2.0))
        print(native.module.instruction_set())
        """
    )
    environment = os.environ | {"DDIM_FAST_CPU": instruction_set}
    output = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    assert output.strip() in (instruction_set, "baseline")
    expected = PlanSampler(folder).sample(seeds=SEEDS, labels=LABELS, guidance=2.0)
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, atol=1e-4)


def test_neither_torch_nor_onnx_runtime_is_imported(folder):
    script = (
        "import sys; sys.modules['torch'] = sys.modules['onnxruntime'] = sys.modules['onnx'] = None; "
        f"from ddim_fast.deploy import PlanSampler; print(PlanSampler({str(folder)!r}).sample(seeds=[1]).shape)"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "(1, 3, 16, 16)"


def test_threads_take_turns(folder):
    sampler = PlanSampler(folder)
    expected = [sampler.sample(seeds=[seed], labels=seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            found = list(pool.map(lambda seed: sampler.sample(seeds=[seed], labels=seed), range(6)))
            assert all(map(np.array_equal, found, expected))


def test_what_a_plan_cannot_do_is_an_error(folder):
    sampler = PlanSampler(folder)
    for request, message in (
        ({"seeds": [1], "labels": 3, "guidance": 2.0, "guidance_interval": (10, 500)}, "a plan guides by labels in every step"),
        ({"seeds": [1], "on_step": print}, "the steps of a plan cannot be watched"),
        ({"seeds": [1], "labels": 10}, "class 10 is out of range"),
        ({"seeds": [-1]}, "a seed is a whole number"),
        ({}, "sampling starts from seeds or from x_T"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.sample(**request)


@pytest.mark.parametrize(
    "options,message",
    [({"dtype": "int8"}, "a plan is in float32 or bfloat16, not int8"), ({"steps": 0}, "steps")],
)
def test_what_cannot_be_exported_is_an_error(options, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_plan(tmp_path / "plan", model, **options)
    assert not (tmp_path / "plan").exists()


def test_a_changed_file_is_found(copy):
    (copy / PLAN).write_text((copy / PLAN).read_text().replace("unipc", "ddim"))
    with pytest.raises(ValueError, match=r"plan\.json: damaged or changed: its checksum is not that of SHA256SUMS; export"):
        PlanSampler(copy)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda d: d.update(format=3), "format 3 is not the one of this version, 2; export the model again"),
        (lambda d: d.pop("runs"), "'runs' is missing or damaged"),
        (lambda d: d.update(batch_size=0), "'batch_size' or 'runs' is damaged"),
        (lambda d: d["runs"]["plain"].update(result=1 << 40), "the result lies outside the memory"),
        (lambda d: d["runs"]["plain"]["calls"][5][2].pop(), r"call 5, \w+: integers are missing"),
        (
            lambda d: d["runs"]["plain"]["calls"][5][1].__setitem__(0, [1, 1 << 40]),
            r"call 5, \w+: a buffer lies outside its segment",
        ),
        (lambda d: d["runs"]["plain"]["segments"][2].update(weight="none"), "run 'plain' is damaged"),
        (lambda d: d["runs"]["plain"]["segments"].pop(), r"call \d+, \w+: a segment is missing"),
    ],
)
def test_a_damaged_description_is_one_line(change, message, copy):
    description = json.loads((copy / PLAN).read_text())
    change(description)
    (copy / PLAN).write_text(json.dumps(description))
    write_checksums(copy)
    with pytest.raises(ValueError, match=message) as caught:
        PlanSampler(copy)
    assert str(copy / PLAN) in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_samples_without_torch(folder, tmp_path):
    blocked = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_module('ddim_fast.sample', run_name='__main__')"
    command = [sys.executable, "-c", blocked, "--engine", "plan", "--model", folder, "--num-images", "5", "--class", "3"]
    output = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert "5 images of 4 steps" in output.stdout and "plan, float32" in output.stdout
    assert len(list((tmp_path / "out").glob("0*.png"))) == 5
    # It goes on, and options that would change the plan are refused.
    for options, message in (
        (["--steps", "9"], "--steps 9 is not that of the plan, 4"),
        (["--compile"], "--compile is not an option of --engine plan"),
    ):
        result = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2 and message in result.stderr
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(tmp_path / "samples")
