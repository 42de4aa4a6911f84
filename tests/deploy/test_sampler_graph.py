import math

import numpy as np
import onnx
import pytest
import torch

from ddim_fast import Sampler, seeded_noise
from ddim_fast.deploy.graph import Graph
from ddim_fast.deploy.onnx_export import _conditions
from ddim_fast.deploy.sampler_graph import _noise, sampler_model, unet_model
from ddim_fast.ops.noise import INITIAL_NOISE, philox4x32

SEEDS, LABELS = [5, 2**62 + 7, 0], [3, 2, 9]


def model_of(graph):
    return onnx.helper.make_model(graph.proto("test"), opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def test_philox_has_the_known_answers(session):
    # Random123's known-answer tests of philox4x32-10.
    counters = np.array([[0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]], np.int64)
    keys = np.array([[0] * 2, [0xFFFFFFFF] * 2, [0xA4093822, 0x299F31D0]], np.int64)
    graph = Graph()
    inputs = [graph.input(f"i{k}", np.int64, (3,)) for k in range(6)]
    words = philox4x32(tuple(inputs[:4]), tuple(inputs[4:]))
    for k, word in enumerate(words):
        graph.output(f"o{k}", word, (3,))
    columns = [*counters.T, *keys.T]
    found = session(model_of(graph)).run(None, {f"i{k}": column for k, column in enumerate(columns)})
    expected = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    np.testing.assert_array_equal(np.stack(found, axis=1), expected)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 5)], ids=str)
@pytest.mark.parametrize("step", [0, 19, INITIAL_NOISE])
def test_the_graph_draws_the_noise_of_the_package(shape, step, session):
    graph = Graph()
    seeds, number = graph.input("seeds", np.int64, ("N",)), graph.input("step", np.int64, ())
    graph.output("noise", _noise(graph, seeds, number, shape), ("N", *shape))
    run = session(model_of(graph))
    for some in ([0, 1, 2**63 - 1, 12345678901], []):
        drawn = run.run(None, {"seeds": np.array(some, np.int64), "step": np.array(step)})[0]
        expected = seeded_noise(some, step, shape).numpy()
        assert drawn.shape == expected.shape and drawn.dtype == np.float32
        np.testing.assert_allclose(drawn, expected, rtol=2e-7, atol=0)


def test_the_unet_agrees_with_torch_whatever_the_batch(exported, session):
    model = unet_model(exported.model.config, exported.embeddings, exported.denoise)
    onnx.checker.check_model(model, full_check=True)
    run = session(model)
    for n in (1, 2, 5):
        x, timesteps, labels = torch.randn(n, 3, 8, 8), torch.arange(n) * 199, torch.arange(n) + 6
        found = run.run(None, {"x": x.numpy(), "timesteps": timesteps.numpy(), "labels": labels.numpy()})[0]
        np.testing.assert_allclose(found, exported.model(x, timesteps, labels).numpy(), atol=1e-5)


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eta": 1.0},
        {"solver": "ddpm", "clip_sample_range": 1.0},
        {"solver": "dpm-solver++"},
        {"solver": "unipc"},
        {"solver": "dpm-solver++3m"},
        {"solver": "heun", "spacing": "karras"},
        {"solver": "consistency"},
    ],
    ids=lambda s: s.get("solver", "ddim") + ("-eta1" if "eta" in s else ""),
)
def test_the_whole_sampler_agrees_with_torch(settings, unroll, exported, session):
    sampler = Sampler(exported.model, steps=20 if settings == {} and not unroll else 4, **settings)
    conditions = _conditions(exported.model, sampler.timesteps)
    model = sampler_model(exported.model.config, exported.denoise, conditions, sampler.solver, unroll=unroll)
    onnx.checker.check_model(model, full_check=True)
    assert ("Loop" in {node.op_type for node in model.graph.node}) != unroll
    run = session(model)
    given = torch.randn(3, 3, 8, 8)
    for n, guidance, x_T in ((3, 1.0, None), (3, 2.5, None), (1, 0.0, None), (3, 1.0, given)):
        request = {"seeds": SEEDS[:n], "labels": LABELS[:n]}
        inputs = {name: np.array(values) for name, values in request.items()}
        inputs |= {
            "guidance": np.array(guidance, np.float32),
            "x_T": np.zeros((0, 3, 8, 8), np.float32) if x_T is None else x_T.numpy(),
        }
        found = run.run(None, inputs)[0]
        expected = sampler.sample(**request, x_T=x_T, guidance=guidance).numpy()
        assert math.isfinite(np.abs(expected).max())
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))


def test_some_noise_may_be_given_and_some_drawn(exported, session):
    sampler = Sampler(exported.model, steps=2)
    conditions = _conditions(exported.model, sampler.timesteps)
    run = session(sampler_model(exported.model.config, exported.denoise, conditions, sampler.solver))
    noise = seeded_noise(SEEDS, INITIAL_NOISE, (3, 8, 8)).numpy()
    inputs = {"seeds": np.array(SEEDS), "labels": np.array([10] * 3), "guidance": np.array(1, np.float32)}
    images = [run.run(None, {**inputs, "x_T": noise[:m]})[0] for m in (0, 1, 3)]
    np.testing.assert_allclose(images[0], images[1], atol=1e-5)
    np.testing.assert_allclose(images[0], images[2], atol=1e-5)


def test_a_constant_that_nothing_uses_is_not_written():
    graph = Graph()
    x = graph.input("x", np.float32, (2,))
    graph.constant(np.arange(100))
    graph.output("y", x + 1.0, (2,))
    assert [tensor.dims for tensor in graph.proto("test").initializer] == [[]]
