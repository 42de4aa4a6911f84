import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from ddim_fast import Sampler
from ddim_fast.deploy import OnnxSampler
from ddim_fast.deploy.folder import write_checksums
from ddim_fast.deploy.onnx_export import export_onnx
from ddim_fast.deploy.onnx_sampler import AS_EXPORTED

SEEDS, LABELS = [5, 2**62 + 7, 0, 9], [3, 2, 9, 3]


def assert_same(found, expected):
    expected = expected.numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.fixture
def folder(export_folder, tmp_path):
    """An export to be changed."""
    return shutil.copytree(export_folder, tmp_path / "onnx")


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("batch_size", [64, 3])
def test_the_same_seeds_give_the_same_images_as_torch(guidance, batch_size, exported, export_folder):
    sampler = OnnxSampler(export_folder)
    request = {"seeds": SEEDS, "labels": LABELS, "guidance": guidance}
    expected = Sampler(exported.model, steps=4).sample(**request)
    assert sampler.runs_whole
    assert_same(sampler.sample(**request, batch_size=batch_size), expected)
    steps = []
    assert_same(sampler.sample(**request, batch_size=batch_size, on_step=steps.append), expected)
    assert [s.step for s in steps] == [0, 1, 2, 3] * (2 if batch_size == 3 else 1)


def test_a_guidance_interval_is_that_of_torch(exported, export_folder):
    sampler, torch_sampler = OnnxSampler(export_folder), Sampler(exported.model, steps=4)
    request = {"seeds": SEEDS, "labels": LABELS, "guidance": 3.0, "guidance_interval": torch_sampler.timesteps[[2, 1]].tolist()}
    guided = torch_sampler.sample(**request)
    assert_same(sampler.sample(**request), guided)
    assert not torch.allclose(guided, torch_sampler.sample(seeds=SEEDS, labels=LABELS, guidance=3.0), atol=1e-2)


def test_each_step_may_have_a_scale_of_its_own(exported, export_folder):
    request = {"seeds": SEEDS, "labels": LABELS, "guidance": [1.0, 3.0, 0.5, 2.0]}
    assert_same(OnnxSampler(export_folder).sample(**request), Sampler(exported.model, steps=4).sample(**request))
    with pytest.raises(ValueError, match="guidance has 4 scales; give one, or one for each of the 3 steps"):
        OnnxSampler(export_folder, steps=3).sample(**request)


@pytest.mark.slow
def test_timesteps_between_those_of_training_are_for_whole_runs(exported, export_folder, tmp_path):
    with pytest.raises(ValueError, match="karras and exponential lie between the timesteps that an exported network takes"):
        OnnxSampler(export_folder, spacing="karras").sample(seeds=SEEDS, labels=LABELS)
    settings = {"steps": 4, "spacing": "karras", "solver": "dpm-solver++3m"}
    export_onnx(tmp_path / "between", exported.model, **settings)
    sampler = OnnxSampler(tmp_path / "between")
    assert sampler.runs_whole
    assert_same(
        sampler.sample(seeds=SEEDS, labels=LABELS), Sampler(exported.model, **settings).sample(seeds=SEEDS, labels=LABELS)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 7},
        {"spacing": [999, 500, 20]},
        {"eta": 0.7},
        {"solver": "unipc"},
        {"solver": "dpm-solver++", "spacing": "log-snr"},
        {"solver": "ddpm", "clip_sample_range": 1.0},
        {"solver": "heun"},
        {"solver": "dpm-solver++3m", "steps": 6},
        {"solver": "consistency"},
    ],
    ids=str,
)
def test_other_settings_than_the_exported_call_the_network_each_step(settings, exported, export_folder):
    sampler = OnnxSampler(export_folder, **settings)
    assert not sampler.runs_whole
    torch_settings = {"steps": None if isinstance(settings.get("spacing"), list) else 4, **settings}
    expected = Sampler(exported.model, **torch_settings)
    assert sampler.timesteps.tolist() == expected.timesteps.tolist()
    assert_same(sampler.sample(seeds=SEEDS, labels=LABELS), expected.sample(seeds=SEEDS, labels=LABELS))


def test_fitted_timesteps_go_with_the_network(use_exported, exported, export_folder, tmp_path, monkeypatch):
    fitted = {"ddim": {4: [960, 700, 400, 90]}, "unipc": {4: [900, 600, 300, 50], 2: [800, 100]}}
    monkeypatch.setattr(exported.model, "fitted_timesteps", fitted)
    folder, request = tmp_path / "fitted", {"seeds": SEEDS, "labels": LABELS}
    stages = []
    stage = lambda name: contextlib.nullcontext(stages.append(name))  # noqa: E731
    export_onnx(folder, exported.model, steps=4, spacing="adaptive", solver="unipc", stage=stage)
    assert stages == ["translating the network to ONNX", "writing and checking unet.onnx and sampler.onnx"]
    for settings, whole in (({}, True), ({"steps": 2}, False), ({"solver": "ddim"}, False)):
        sampler = OnnxSampler(folder, **settings)
        expected = Sampler(exported.model, **{"steps": 4, "spacing": "adaptive", "solver": "unipc", **settings})
        assert sampler.runs_whole == whole and sampler.timesteps.tolist() == expected.timesteps.tolist()
        assert_same(sampler.sample(**request), expected.sample(**request))
    with pytest.raises(ValueError, match=r"for 2 to 4 steps; got 3"):
        OnnxSampler(folder, steps=3)
    with pytest.raises(ValueError, match=r"no timesteps have been fitted to this model and dpm-solver\+\+"):
        OnnxSampler(folder, solver="dpm-solver++")
    with pytest.raises(ValueError, match="no timesteps have been fitted to this model"):
        OnnxSampler(export_folder, spacing="adaptive")
    (folder / "timesteps.json").write_text((folder / "timesteps.json").read_text().replace("960", "970"))
    with pytest.raises(ValueError, match=r"timesteps\.json: damaged or changed"):
        OnnxSampler(folder)


def test_a_fitted_solver_goes_with_the_network(use_exported, exported, tmp_path, monkeypatch):
    """UniPC's own rows, under another name: fitted ones differ in their numbers only."""
    rows = {steps: Sampler(exported.model, steps=steps, solver="unipc") for steps in (4, 2)}
    timesteps = {"fitted": {steps: sampler.timesteps.tolist() for steps, sampler in rows.items()}}
    monkeypatch.setattr(exported.model, "fitted_timesteps", timesteps)
    coefficients = {steps: sampler.solver.table.tolist() for steps, sampler in rows.items()}
    monkeypatch.setattr(exported.model, "fitted_coefficients", coefficients)
    export_onnx(tmp_path / "fitted", exported.model, steps=4, solver="fitted")
    for settings, whole in (({}, True), ({"steps": 2}, False)):
        sampler = OnnxSampler(tmp_path / "fitted", **settings)
        expected = rows[settings.get("steps", 4)].sample(seeds=SEEDS, labels=LABELS)
        assert sampler.runs_whole == whole
        assert_same(sampler.sample(seeds=SEEDS, labels=LABELS), expected)
    with pytest.raises(ValueError, match="solver fitted: the one fitted to this model is for 2, 4 steps; got 3"):
        OnnxSampler(tmp_path / "fitted", steps=3)


def test_no_label_a_single_label_and_given_noise(exported, export_folder):
    sampler, torch_sampler = OnnxSampler(export_folder), Sampler(exported.model, steps=4)
    x_T = torch.randn(2, 3, 8, 8)
    assert_same(sampler.sample(seeds=SEEDS), torch_sampler.sample(seeds=SEEDS))
    assert_same(sampler.sample(seeds=SEEDS, labels=4), torch_sampler.sample(seeds=SEEDS, labels=4))
    assert_same(sampler.sample(x_T=x_T.numpy()), torch_sampler.sample(x_T=x_T))
    assert sampler.sample(seeds=[]).shape == (0, 3, 8, 8)


def test_a_trajectory_shows_what_torch_shows(exported, export_folder):
    request = {"seeds": SEEDS[:2], "labels": LABELS[:2], "guidance": 1.5}
    states = zip(
        OnnxSampler(export_folder).trajectory(**request), Sampler(exported.model, steps=4).trajectory(**request), strict=True
    )
    for found, expected in states:
        assert (found.step, found.timestep) == (expected.step, expected.timestep)
        assert_same(found.x, expected.x)
        assert_same(found.x0, expected.x0)


@pytest.mark.parametrize("steps", [4, 2], ids=["whole", "step by step"])
def test_calls_overwrite_neither_noise_nor_results(steps, export_folder):
    sampler = OnnxSampler(export_folder, steps=steps)
    noise = [np.random.default_rng(k).standard_normal((1, 3, 8, 8), dtype=np.float32) for k in range(2)]
    kept = [array.copy() for array in noise]
    images = [sampler.sample(x_T=array) for array in noise]
    for k in (0, 1):
        np.testing.assert_array_equal(noise[k], kept[k])
        np.testing.assert_array_equal(images[k], OnnxSampler(export_folder, steps=steps).sample(x_T=kept[k]))


@pytest.mark.parametrize(
    "request_,message",
    [
        ({}, "from seeds or from x_T"),
        ({"seeds": [-1]}, "a seed is a whole number"),
        ({"seeds": [1], "labels": [10]}, "class 10 is out of range: the network has classes 0..9"),
        ({"seeds": [1], "labels": [-1]}, "class -1 is out of range"),
        ({"seeds": [1], "labels": [1.5]}, "whole numbers"),
        ({"seeds": [1, 2], "labels": [1]}, "1 class label for 2 images"),
        ({"seeds": [1], "guidance": 2.0}, "needs class labels"),
        ({"x_T": np.zeros((1, 3, 9, 8), np.float32)}, r"shape \(N, 3, 8, 8\); got \(1, 3, 9, 8\)"),
        ({"x_T": np.zeros((1, 3, 8, 8), np.uint8)}, r"got uint8: convert 8-bit images by images / 127\.5 - 1"),
        ({"x_T": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, r"got torch\.uint8: convert"),
        ({"x_T": "noise"}, "arrays of numbers; got str"),
        ({"seeds": [1, 2], "x_T": np.zeros((1, 3, 8, 8), np.float32)}, "2 seeds for 1 image"),
        ({"seeds": [1], "batch_size": 0}, "batch_size"),
    ],
)
def test_a_wrong_request_is_told(request_, message, export_folder):
    with pytest.raises(ValueError, match=message):
        OnnxSampler(export_folder).sample(**request_)


def test_a_provider_that_is_not_there_is_told(export_folder):
    with pytest.raises(ValueError, match=r"provider 'tpu' is not there: this onnxruntime has .*cpu"):
        OnnxSampler(export_folder, provider="tpu")
    for name in ("cpu", "CPU", "CPUExecutionProvider", None):
        assert OnnxSampler(export_folder, provider=name).provider.endswith("ExecutionProvider")


def test_a_provider_that_does_not_start_gives_way_unless_it_was_asked_for(export_folder, monkeypatch):
    """onnxruntime-gpu lists CUDA on every machine."""
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("ddim_fast.deploy.session.onnxruntime.get_available_providers", lambda: listed)
    with pytest.warns(UserWarning, match="has CUDAExecutionProvider, but it does not start here"):
        sampler = OnnxSampler(export_folder)
    assert sampler.provider == "CPUExecutionProvider" and sampler.sample(seeds=[0]).shape == (1, *sampler.image_shape)
    with pytest.raises(ValueError, match="CUDAExecutionProvider does not start here"):
        OnnxSampler(export_folder, provider="cuda").sample(seeds=[0])


@pytest.mark.parametrize("asked,threads", [("1", 1), ("1,4", 1), ("", None), ("many", None)])
def test_threads_are_as_many_as_omp_num_threads_says(asked, threads, export_folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    options, make = [], onnxruntime.InferenceSession

    def session(path, given, **settings):
        options.append(given)
        return make(path, given, **settings)

    monkeypatch.setattr("ddim_fast.deploy.session.onnxruntime.InferenceSession", session)
    OnnxSampler(export_folder, provider="cpu").load()
    assert [o.intra_op_num_threads for o in options] == [threads or len(os.sched_getaffinity(0))]


def _to_external(folder, location):
    """Moves the weights of the network to a file of their own."""
    path = folder / "unet.onnx"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="unet.onnx.data", size_threshold=1024)
    if location != "unet.onnx.data":
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                next(entry for entry in tensor.external_data if entry.key == "location").value = location
        path.write_bytes(model.SerializeToString())
        shutil.move(folder / "unet.onnx.data", folder / location)
    write_checksums(folder)


def _remove_external(folder):
    _to_external(folder, "unet.onnx.data")
    (folder / "unet.onnx.data").unlink()


def _truncate(folder, name="sampler.onnx", sign=False):
    (folder / name).write_bytes((folder / name).read_bytes()[:-1000])
    if sign:
        write_checksums(folder)


def _swap(folder):
    """Another model under the name of this one."""
    shutil.copy(folder / "unet.onnx", folder / "sampler.onnx")
    write_checksums(folder)


def _rename(folder, name):
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("  sampler.onnx", f"  {name}"))


@pytest.mark.parametrize(
    "damage,error,message",
    [
        (_truncate, ValueError, "sampler.onnx: damaged or changed"),
        (lambda f: _truncate(f, sign=True), ValueError, "sampler.onnx: "),
        (lambda f: _truncate(f, "schedule.json"), ValueError, "schedule.json: damaged or changed"),
        (_swap, ValueError, "sampler.onnx: .*(input|name)"),
        (_remove_external, FileNotFoundError, "has no unet.onnx.data"),
        (lambda f: _to_external(f, "../w.data"), ValueError, "escapes model directory"),
        (lambda f: _rename(f, "../sampler.onnx"), ValueError, r"SHA256SUMS: '../sampler.onnx' leads out of the folder"),
        (lambda f: _rename(f, "other.onnx"), ValueError, "there is no checksum of sampler.onnx"),
        (lambda f: (f / "SHA256SUMS").write_text("?"), ValueError, "SHA256SUMS: '\\?' is not a checksum and a name"),
        (lambda f: (f / "SHA256SUMS").unlink(), FileNotFoundError, "has no SHA256SUMS"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json"),
    ],
)
def test_a_damaged_export_is_told_in_one_line(damage, error, message, folder):
    damage(folder)
    with pytest.raises(error, match=message) as raised:
        for steps in (4, 2):  # in one call, and step by step
            OnnxSampler(folder, steps=steps).sample(seeds=[1])
    assert "\n" not in str(raised.value)


def test_external_data_is_read_and_checked(folder, exported):
    _to_external(folder, "unet.onnx.data")
    found = OnnxSampler(folder, steps=2).sample(seeds=[1])
    assert_same(found, Sampler(exported.model, steps=2).sample(seeds=[1]))
    data = folder / "unet.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"unet.onnx.data: damaged or changed"):
        OnnxSampler(folder, steps=2).sample(seeds=[1])


def test_a_model_of_another_shape_is_told(folder):
    from ddim_fast.deploy.session import Session

    run = Session(folder / "unet.onnx", "CPUExecutionProvider")
    inputs = {"timesteps": np.zeros(1, np.int64), "labels": np.zeros(1, np.int64)}
    with pytest.raises(ValueError, match=r"unet.onnx: .*Got: 9 Expected: 8") as raised:
        run({**inputs, "x": np.zeros((1, 3, 9, 8), np.float32)}, (1, 3, 9, 8))
    assert "\n" not in str(raised.value)


# Runs code where torch and all that is for exporting cannot be imported.
_BARE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript", "safetensors", "huggingface_hub"):
            raise ImportError(f"{name} is not to be imported", name=name)
sys.meta_path.insert(0, Refuse())
"""


def bare(code, **environment):
    command = [sys.executable, "-c", _BARE + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def test_no_torch_is_imported(export_folder, exported):
    done = bare(f"""
        from ddim_fast.deploy import OnnxSampler
        for eta in (0.0, 1.0):
            images = OnnxSampler({str(export_folder)!r}, eta=eta).sample(seeds={SEEDS}, labels={LABELS}, guidance=2.0)
            print(images.tobytes().hex())
    """)
    assert done.returncode == 0, done.stderr
    for eta, line in zip((0.0, 1.0), done.stdout.splitlines(), strict=True):
        images = np.frombuffer(bytes.fromhex(line), np.float32).reshape(4, 3, 8, 8)
        assert_same(images, Sampler(exported.model, steps=4, eta=eta).sample(seeds=SEEDS, labels=LABELS, guidance=2.0))


def test_a_checkpoint_is_exported_at_its_first_use(use_exported, exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exported.model.save_pretrained(tmp_path / "photos")
    first = OnnxSampler(tmp_path / "photos", steps=2).sample(seeds=[1])
    assert "exporting" in capsys.readouterr().err
    second = OnnxSampler(tmp_path / "photos", steps=2).sample(seeds=[1])
    np.testing.assert_array_equal(first, second)
    assert capsys.readouterr().err == "" and len(list((tmp_path / "cache" / "ddim_fast" / "onnx").iterdir())) == 1
    # What is in the cache needs no torch either.
    code = f"from ddim_fast.deploy import OnnxSampler; OnnxSampler({str(tmp_path / 'photos')!r}, steps=2).sample(seeds=[1])"
    assert bare(code, XDG_CACHE_HOME=str(tmp_path / "cache")).returncode == 0
    # And without it, there is nothing to be had.
    done = bare(code, XDG_CACHE_HOME=str(tmp_path / "empty"))
    assert "is exported to ONNX at its first use, which needs" in done.stderr and "python -m ddim_fast.export" in done.stderr


def test_a_bfloat16_model_needs_another_provider(folder):
    schedule = folder / "schedule.json"
    schedule.write_text(schedule.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    write_checksums(folder)
    with pytest.raises(ValueError, match="bfloat16 model, which ONNX Runtime cannot run on a CPU"):
        OnnxSampler(folder, provider="cpu")


@pytest.mark.parametrize("steps", [AS_EXPORTED, 3])
def test_threads_get_their_own_images(steps, export_folder):
    """Of an export's whole sampler, and of its network called once a step."""
    sampler = OnnxSampler(export_folder, steps=steps)
    requests = [{"seeds": range(k, k + 1 + k % 3), "labels": k % 10} for k in range(40)]
    with ThreadPoolExecutor(4) as threads:
        found = [*threads.map(lambda request: sampler.sample(**request), requests)]
    for request, images in zip(requests, found, strict=True):
        np.testing.assert_array_equal(images, sampler.sample(**request))
