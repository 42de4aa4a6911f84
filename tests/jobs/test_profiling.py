"""Where a run's time goes."""

import json

import numpy as np
import pytest
import torch

from ddim_fast import Sampler
from ddim_fast.jobs.profiling import profile_sampling
from ddim_fast.jobs.time_table import RUN, Profile, time_table
from ddim_fast.ops import attention, conv3x3, ddim_step, group_norm_silu, native

STEPS = 3
REQUEST = {"seeds": [1, 2], "labels": [3, 4]}


def calls(profile: Profile) -> dict[str, int]:
    return {row.name: row.calls for row in profile.rows}


def check_sum(profile: Profile) -> None:
    assert all(row.milliseconds >= 0 for row in profile.rows)
    assert sum(row.milliseconds for row in profile.rows) == pytest.approx(profile.milliseconds)


@pytest.mark.parametrize("solver", ["ddim", "unipc"])
def test_every_operator_of_a_known_network_is_counted(solver, small_unet, tmp_path):
    profile = profile_sampling(Sampler(small_unet, steps=STEPS, solver=solver), tmp_path / "new" / "trace.json", **REQUEST)
    check_sum(profile)
    found = calls(profile)
    # 8 residual blocks of two, enlarging and reducing, first and last; 4 with attention; and a norm before the last.
    assert found["convolutions"] == STEPS * (2 * 8 + 2 + 2)
    assert found["attention"] == STEPS * 4
    assert found["norms with SiLU"] == STEPS * (2 * 8 + 4 + 1)
    assert found["solver"] == STEPS and found["fused by torch.compile"] == 0
    # Two linear layers around each attention, and shortcuts; before the first step the embeddings.
    assert found["matrix products"] >= STEPS * 2 * 4
    assert found["the rest"] > 0
    assert set(profile.served) == {"attention", "conv3x3", "group_norm_silu"} | ({"ddim_step"} if solver == "ddim" else set())
    assert list(profile.served["attention"]) == ["PyTorch"]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_implementations_are_named_in_the_table_and_in_the_trace(backend, small_unet, tmp_path, monkeypatch):
    if backend == "native" and native.module is None:
        pytest.skip(native.why_not)
    monkeypatch.setenv("DDIM_FAST_BACKEND", backend)
    profile = profile_sampling(Sampler(small_unet, steps=STEPS), tmp_path / "trace.json", **REQUEST)
    server = "PyTorch" if backend == "reference" else "native"
    expected = {"attention": ["PyTorch"], "conv3x3": [server], "ddim_step": [server], "group_norm_silu": [server]}
    assert profile.served == expected
    names = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    for operator, (name,) in expected.items():
        assert f"{operator} {name}" in str(profile) and f"ddim_fast::{operator}[{name}]" in names
    assert names.count(RUN) == 1 and "aten::conv2d" in names and "ddim_fast::solver_step" in names
    # As many norms, whoever computes them.
    assert calls(profile)["norms with SiLU"] == STEPS * (2 * 8 + 4 + 1)


def test_nothing_is_left_behind(small_unet, tmp_path):
    sampler = Sampler(small_unet, steps=STEPS)
    before = sampler.sample(**REQUEST)
    names = [(module, "choose") for module in (attention, ddim_step, group_norm_silu)]
    names += [(conv3x3, "_run_native"), (conv3x3, "conv3x3_reference")]
    functions = [getattr(module, name) for module, name in names]
    profile_sampling(sampler, tmp_path / "trace.json", **REQUEST)
    assert functions == [getattr(module, name) for module, name in names]
    assert torch.equal(sampler.sample(**REQUEST), before)


@pytest.mark.slow
def test_kernels_of_torch_compile_are_a_line_of_their_own(fake_network, tmp_path):
    sampler = Sampler(fake_network(num_classes=10), steps=STEPS, engine="compiled")
    before = sampler.sample(**REQUEST)
    profile = profile_sampling(sampler, tmp_path / "trace.json", **REQUEST)
    check_sum(profile)
    assert calls(profile)["fused by torch.compile"] >= STEPS and calls(profile)["solver"] == 0
    assert torch.equal(sampler.sample(**REQUEST), before)  # by what it had compiled


@pytest.mark.slow
def test_compiled_networks_have_the_operators_of_eager_ones(small_unet, tmp_path):
    eager, compiled = (
        profile_sampling(Sampler(small_unet, steps=STEPS, engine=engine), tmp_path / "trace.json", **REQUEST)
        for engine in ("eager", "compiled")
    )
    check_sum(compiled)
    for kind in ("convolutions", "attention", "norms with SiLU"):
        assert calls(compiled)[kind] == calls(eager)[kind], kind
    assert compiled.served == {name: servers for name, servers in eager.served.items() if name != "ddim_step"}


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "compiled", "captured"])
def test_on_a_gpu_the_times_are_of_kernels(engine, small_unet, tmp_path):
    profile = profile_sampling(Sampler(small_unet.cuda(), steps=STEPS, engine=engine), tmp_path / "trace.json", **REQUEST)
    check_sum(profile)
    assert profile.on_gpu and "kernels" in str(profile)
    for kind in ("convolutions", "matrix products", "attention", "norms with SiLU"):
        assert calls(profile)[kind] >= STEPS, kind


def test_with_a_tolerance_there_is_no_profile(small_unet, tmp_path):
    with pytest.raises(ValueError, match="a profile needs steps that all images share"):
        profile_sampling(Sampler(small_unet, tolerance=0.1), tmp_path / "trace.json", **REQUEST)
    assert list(tmp_path.iterdir()) == []


def event(name, category, start, length, thread=1, **arguments):
    """A range in a Chrome trace; times in microseconds."""
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": length, "tid": thread, "args": arguments}


def host_and_gpu(*operators):
    """A run of 1000 us in which each operator, (name, the kernel it launches, kernel's start and length), takes 10."""
    events = [event(RUN, "user_annotation", 0, 1000), event(RUN, "gpu_user_annotation", 100, 700, thread=7)]
    for i, (operator, kernel, start, length) in enumerate(operators):
        events.append(event(operator, "cpu_op", 20 * i, 10))
        events.append(event("cudaLaunchKernel", "cuda_runtime", 20 * i + 5, 2, correlation=i))
        events.append(event(kernel, "kernel", start, length, thread=7, correlation=i))
    return events


def test_a_kernel_is_of_the_operator_that_launched_it():
    wall, rows = time_table(
        host_and_gpu(
            ("aten::conv2d", "sm90_xmma_gemm_bf16", 100, 200),
            ("ddim_fast::group_norm_silu[triton]", "merge_kernel", 300, 50),
            ("aten::add", "elementwise_kernel", 350, 30),
            ("ddim_fast::solver_step", "elementwise_kernel", 370, 30),  # 10 of them beside the kernel before
            ("aten::linear", "nvjet_tst_64x8", 900, 200),  # half of it after the end
        ),
        on_gpu=True,
    )
    assert wall == 1
    assert {name: (round(ms * 1000), calls) for name, ms, calls in rows} == {
        "convolutions": (200, 1),
        "matrix products": (100, 1),
        "attention": (0, 0),
        "norms with SiLU": (50, 1),
        "solver": (20, 1),
        "fused by torch.compile": (0, 0),
        "the rest": (30, 1),
        "gaps": (600, 0),
    }


KERNELS = {
    "convolutions": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64",
        "void cudnn::ops::nchwToNhwcKernel<float, float>(cudnn::ops::nchw2nhwc_params_t)",
        "triton_tem_fused_convolution_4",
    ],
    "matrix products": [
        "nvjet_tst_192x136_64x4_1x2_h_bz_coopB_TNN",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_32x6_nn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16>",
        "triton_tem_fused_addmm_3",
        "triton_tem_fused_mm_3",
    ],
    "attention": [
        "attention_kernel",
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64>>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16",
    ],
    "norms with SiLU": [
        "group_norm_silu_kernel",
        "void (anonymous namespace)::group_norm_silu_kernel<float, 4, true>(GroupNormSilu<float>)",
        "chunk_statistics_kernel",
        "merge_kernel",
        "triton_red_fused_native_group_norm_2",
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>(long, float, float const*)",
    ],
    "solver": ["ddim_step_kernel"],
    "fused by torch.compile": ["triton_poi_fused_add_convolution_5", "triton_per_fused_group_norm_silu_view_9"],
    "the rest": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>",
        "Memcpy DtoD (Device -> Device)",
    ],
}


@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_of_a_cuda_graph_are_known_by_their_names(kind):
    launch = event("cudaGraphLaunch", "cuda_runtime", 10, 5, correlation=1)
    kernels = [event(name, "kernel", 100 + i, 1, thread=7, correlation=1) for i, name in enumerate(KERNELS[kind])]
    _, rows = time_table([event(RUN, "user_annotation", 0, 1000), launch, *kernels], on_gpu=True)
    assert {row.name: row.calls for row in rows if row.calls} == {kind: len(kernels)}


def test_nested_operators_count_once_and_frames_around_them_not_at_all():
    events = [
        event("ddim_fast::solver_step", "user_annotation", 100, 100),
        event("ddim_fast::ddim_step[native]", "user_annotation", 120, 50),
        event("Torch-Compiled Region: 0/0", "cpu_op", 300, 300),
        event("aten::pad", "cpu_op", 300, 100),
        event("aten::mm", "cpu_op", 310, 60),
        event("graph_0_cpp_fused_add_conv3x3_view_7", "cpu_op", 400, 50),
        event("aten::mm", "cpu_op", 400, 50, thread=2),  # of somebody else
        event("aten::mm", "cpu_op", 1000, 50),  # afterwards
    ]
    _, rows = time_table([event(RUN, "user_annotation", 0, 1000), *events], on_gpu=False)
    assert {name: (round(ms * 1000), calls) for name, ms, calls in rows if ms} == {
        "matrix products": (60, 1),
        "solver": (100, 1),
        "fused by torch.compile": (50, 1),
        "the rest": (40, 1),
        "gaps": (750, 0),
    }


def test_another_trace_is_refused():
    with pytest.raises(ValueError, match=r"the trace has no range ddim_fast\.run"):
        time_table([event("aten::mm", "cpu_op", 0, 1)], on_gpu=False)


def test_the_table_has_a_line_for_each_kind(small_unet, tmp_path):
    profile = profile_sampling(Sampler(small_unet, steps=1), tmp_path / "trace.json", **REQUEST)
    title, heading, *lines, total, served = str(profile).splitlines()
    assert title.startswith("a batch of 2 in 1 steps, eager, float32, cpu: ") and heading.split() == ["ms", "share", "calls"]
    assert [line.split("  ")[0] for line in lines] == [row.name for row in profile.rows]
    shares = [float(line.split("%")[0].split()[-1]) for line in lines]
    np.testing.assert_allclose(sum(shares), 100, atol=0.5)
    assert total.split()[:1] == ["sum"] and "100.0%" in total and served.startswith("implementations: attention ")
