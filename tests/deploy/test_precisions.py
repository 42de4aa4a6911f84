"""Networks in fewer bits, fused for CUDA, of other shapes: judged against PyTorch's float32."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ddim_fast import Sampler, UNet, UNetConfig
from ddim_fast.deploy import OnnxSampler
from ddim_fast.deploy import onnx_export as exporting
from ddim_fast.deploy.network import export_network
from ddim_fast.deploy.onnx_export import export_onnx
from ddim_fast.deploy.optimise import fuse_for_cuda
from ddim_fast.deploy.quantise import calibration, quantise
from ddim_fast.deploy.sampler_graph import sampler_model
from ddim_fast.models.formats.diffusers import save_diffusers

REQUEST = {"seeds": [1, 2, 3], "labels": [0, 5, 9]}


def rms(difference) -> float:
    return float(np.sqrt(np.square(difference, dtype=np.float64).mean()))


@pytest.fixture
def images_of(exported):
    """A function from the network in ONNX to the images that the whole sampler makes with it."""

    def sample(denoise, optimised=True, steps=4):
        sampler = Sampler(exported.model, steps=steps)
        conditions = exporting._conditions(exported.model, sampler.timesteps)
        model = sampler_model(exported.model.config, denoise, conditions, sampler.solver)
        options = onnxruntime.SessionOptions()
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
        run = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        inputs = {name: np.array(values) for name, values in REQUEST.items()}
        inputs |= {"x_T": np.zeros((0, 3, 8, 8), np.float32), "guidance": np.array(2, np.float32)}
        return run.run(None, inputs)[0]

    return sample


@pytest.fixture
def torch_images(exported):
    """A function from a dtype to the images that PyTorch makes in it."""
    return lambda dtype: Sampler(exported.model, steps=4, dtype=dtype).sample(**REQUEST, guidance=2.0).numpy()


def rounded(model):
    """A bfloat16 model for programs that have no bfloat16 but as a number to be stored: what every operator returns is float32,
    rounded to bfloat16."""
    kinds = {info.name: info.type.tensor_type.elem_type for info in onnx.shape_inference.infer_shapes(model).graph.value_info}
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    del wide.graph.node[:], wide.graph.initializer[:], wide.graph.value_info[:]
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        narrow = tensor.data_type == TensorProto.BFLOAT16
        wide.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), tensor.name) if narrow else tensor)
    count = 0
    for node in model.graph.node:
        wide.graph.node.append(node)
        for k, name in enumerate(node.output):
            if kinds.get(name) == TensorProto.BFLOAT16:
                count += 1
                if node.op_type == "Cast":
                    wide.graph.node[-1].attribute[0].i = TensorProto.FLOAT
                wide.graph.node[-1].output[k] = f"{name}/exact"
                for a, b, kind in (("/exact", "/bf16", TensorProto.BFLOAT16), ("/bf16", "", TensorProto.FLOAT)):
                    wide.graph.node.append(helper.make_node("Cast", [name + a], [name + b], name=name + a, to=kind))
    assert count > 50
    return wide


@pytest.mark.slow
@pytest.mark.parametrize("name,opset", [("float16", 20), ("bfloat16", 22)])
def test_half_precision_errs_no_more_than_pytorch(name, opset, exported, images_of, torch_images):
    dtype = getattr(torch, name)
    _, denoise = export_network(exported.model, dtype, opset)
    onnx.checker.check_model(denoise, full_check=True)
    kind = getattr(TensorProto, name.upper())
    weights = [t for t in denoise.graph.initializer if t.data_type == kind]
    assert sum(np.prod(t.dims) for t in weights) > 0.9 * sum(p.numel() for p in exported.model.parameters()) / 2
    exact = torch_images(torch.float32)
    # ONNX Runtime computes float16 on a CPU in float32 and rounds what operators return; of bfloat16 it has nothing there.
    found = images_of(denoise) if name == "float16" else images_of(rounded(denoise), optimised=False)
    assert rms(exact) * 1e-5 < rms(found - exact) <= 2 * rms(torch_images(dtype) - exact)


def test_int8_keeps_the_images(exported, images_of, torch_images):
    sampler = Sampler(exported.model, steps=4)
    quantised = quantise(exported.denoise, calibration(sampler, exporting._conditions(exported.model, sampler.timesteps)))
    onnx.checker.check_model(quantised, full_check=True)
    producers = {output: node for node in quantised.graph.node for output in node.output}
    convolutions = [node for node in quantised.graph.node if node.op_type == "Conv"]
    in_8_bits = [node.input[0] in producers and producers[node.input[0]].op_type == "DequantizeLinear" for node in convolutions]
    assert in_8_bits == [False, *[True] * (len(convolutions) - 2), False]
    scales = {tensor.name: tensor for tensor in quantised.graph.initializer}
    for node in convolutions[1:-1]:
        weights = producers[node.input[1]]
        assert scales[weights.input[0]].data_type == TensorProto.INT8
        assert list(scales[weights.input[1]].dims) == scales[weights.input[0]].dims[:1]  # a scale each output channel
    exact = torch_images(torch.float32)
    assert 1e-4 < rms(images_of(quantised) - exact) / rms(exact) < 0.1


class GroupNorm(OpRun):
    """ONNX Runtime's, as its documentation of contributed operators says."""

    op_domain = "com.microsoft"

    def _run(self, x, gamma, beta, activation=None, channels_last=1, epsilon=1e-5, groups=None):
        assert channels_last in (None, 1)
        n, h, w, c = x.shape
        split = x.astype(np.float64).reshape(n, h * w, groups, c // groups)
        mean, variance = split.mean((1, 3), keepdims=True), split.var((1, 3), keepdims=True)
        y = ((split - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
        return ((y / (1 + np.exp(-y)) if activation else y).astype(x.dtype),)


class NhwcConv(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, w, b=None, auto_pad=None, dilations=None, group=None, kernel_shape=None, pads=None, strides=None):
        image, weight = (torch.from_numpy(a.astype(np.float32)).permute(0, 3, 1, 2) for a in (x, w))
        top, left, bottom, right = pads or (0, 0, 0, 0)
        image = torch.nn.functional.pad(image, (left, right, top, bottom))
        bias = None if b is None else torch.from_numpy(b.astype(np.float32))
        y = torch.nn.functional.conv2d(image, weight, bias, strides or 1)
        return (y.permute(0, 2, 3, 1).numpy().astype(x.dtype),)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_what_is_fused_for_cuda_means_the_same(half, exported):
    plain = [node.op_type for node in exported.denoise.graph.node]
    fused = fuse_for_cuda(exported.denoise, half)
    kinds = [(node.domain, node.op_type) for node in fused.graph.node]
    norms = [node for node in fused.graph.node if node.op_type == "GroupNorm"]
    assert len(norms) == plain.count("InstanceNormalization")
    assert ("", "InstanceNormalization") not in kinds
    assert sum(helper.get_node_attr_value(node, "activation") for node in norms) == plain.count("Sigmoid")
    assert kinds.count(("com.microsoft", "NhwcConv")) > 0.6 * plain.count("Conv")
    assert ("com.microsoft", 1) in {(entry.domain, entry.version) for entry in fused.opset_import}
    onnx.checker.check_model(fused)
    # No program on a CPU has these operators, so they are computed as they are documented.
    x = torch.randn(2, 3, 8, 8)
    condition = exported.model.condition(torch.tensor([3, 700]), torch.tensor([1, 10]))
    inputs = {"x": x.numpy(), "condition": condition.numpy()}
    found = ReferenceEvaluator(fused, new_ops=[GroupNorm, NhwcConv]).run(None, inputs)[0]
    expected = exported.model.denoise(x, condition).numpy()
    assert found.dtype == np.float32
    assert rms(found - expected) < (2e-3 if half else 1e-5) * rms(expected)


@pytest.mark.parametrize("options", [{}, {"unroll": True, "dtype": "float16"}], ids=["loop", "unrolled-float16"])
def test_an_export_for_cuda_is_a_graph_that_onnx_runtime_takes(options, use_exported, exported, tmp_path):
    export_onnx(tmp_path / "onnx", exported.model, steps=2, optimize="cuda", **options)
    for name in ("unet.onnx", "sampler.onnx"):
        # It resolves the graph, types and shapes included, and then finds that its CPU provider has no such operators.
        with pytest.raises(Exception, match=r"Failed to find kernel for|Could not find an implementation"):
            onnxruntime.InferenceSession(tmp_path / "onnx" / name, providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_a_network_that_diffusers_saved_is_exported(make_unet, tmp_path):
    small = {"sample_size": 16, "base_channels": 8, "norm_num_groups": 4, "channel_multipliers": (1, 2, 2)}
    small["layers_per_block"] = 1
    theirs = {"flip_sin_to_cos": True, "freq_shift": 0.0, "downsample_padding": 1}
    fields = UNetConfig.preset("cifar10-64", **small, **theirs).to_dict()
    saved = make_unet(**fields)
    save_diffusers(tmp_path / "theirs", saved.config, saved.state_dict())
    model = UNet.from_pretrained(tmp_path / "theirs")
    export_onnx(tmp_path / "onnx", model, steps=20)
    found = OnnxSampler(tmp_path / "onnx").sample(seeds=[1, 2])
    expected = Sampler(model, steps=20).sample(seeds=[1, 2]).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))


def test_a_network_above_what_one_file_holds_has_external_data(use_exported, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "LARGEST", 100_000)
    export_onnx(tmp_path / "onnx", exported.model, steps=2)
    names = {p.name for p in (tmp_path / "onnx").iterdir()}
    assert {"unet.onnx.data", "sampler.onnx.data"} <= names
    assert (tmp_path / "onnx" / "unet.onnx").stat().st_size < 1_000_000
    assert "unet.onnx.data" in (tmp_path / "onnx" / "SHA256SUMS").read_text()
    expected = Sampler(exported.model, steps=2).sample(**REQUEST).numpy()
    np.testing.assert_allclose(OnnxSampler(tmp_path / "onnx").sample(**REQUEST), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "options,message",
    [
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"opset": 17}, "opset must be from 18 to 23"),
        ({"opset": 20, "dtype": "bfloat16"}, "opset must be from 22 to 23 for bfloat16"),
        ({"optimize": "cpu"}, "optimize must be one of cuda"),
        ({"optimize": "cuda", "dtype": "int8"}, "for float32 and float16"),
        ({"steps": 0}, "steps must be"),
        ({"solver": "euler"}, "unknown solver"),
    ],
)
def test_a_wrong_option_is_told_and_leaves_nothing(options, message, exported, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(tmp_path / "onnx", exported.model, **options)
    assert list(tmp_path.iterdir()) == []
