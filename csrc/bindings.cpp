// The Python module ddim_fast._native. It takes addresses, not tensors, so it fits every version of torch and serves
// numpy and ONNX Runtime as well; whoever calls it keeps the arrays alive and of the stated size.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "ddim_step.h"
#include "group_norm_silu.h"
#include "vector.h"

namespace py = pybind11;

namespace ddim_fast {
namespace {

DdimArrays check_arrays(uintptr_t sample, uintptr_t model_output, uintptr_t noise, uintptr_t out, int64_t numel) {
    if (numel < 0) throw py::value_error("numel is " + std::to_string(numel) + ", but cannot be negative");
    // Empty tensors have null pointers.
    const auto require = [numel](uintptr_t pointer, const char* name) {
        if (pointer == 0 && numel > 0) throw py::value_error(std::string(name) + " is a null pointer");
    };
    require(sample, "sample_ptr");
    require(model_output, "model_output_ptr");
    require(out, "out_ptr");
    return {reinterpret_cast<const float*>(sample), reinterpret_cast<const float*>(model_output),
            reinterpret_cast<const float*>(noise), reinterpret_cast<float*>(out), numel};
}

DdimCoefficients check_coefficients(const std::vector<float>& c) {
    if (c.size() != 7) throw py::value_error("coefficients has " + std::to_string(c.size()) + " values instead of 7");
    return {c[0], c[1], c[2], c[3], c[4], c[5], c[6]};
}

void check_clip(float clip) {
    if (clip > 0) return;  // false for NaN
    throw py::value_error("clip is " + std::to_string(clip) + ", but must be positive (inf: no clipping)");
}

void ddim_step_binding(uintptr_t sample, uintptr_t model_output, uintptr_t noise, uintptr_t out, int64_t numel,
                       const std::vector<float>& coefficients, float clip, int num_threads) {
    const DdimArrays arrays = check_arrays(sample, model_output, noise, out, numel);
    const DdimCoefficients checked = check_coefficients(coefficients);
    check_clip(clip);
    if (num_threads < 1)
        throw py::value_error("num_threads is " + std::to_string(num_threads) + ", but must be at least 1");
    ddim_step(arrays, checked, clip, num_threads);
}

#ifdef DDIM_FAST_WITH_CUDA
void ddim_step_cuda_binding(uintptr_t sample, uintptr_t model_output, uintptr_t noise, uintptr_t out, int64_t numel,
                            const std::vector<float>& coefficients, float clip, uintptr_t stream) {
    const DdimArrays arrays = check_arrays(sample, model_output, noise, out, numel);
    const DdimCoefficients checked = check_coefficients(coefficients);
    check_clip(clip);
    ddim_step_cuda(arrays, checked, clip, reinterpret_cast<void*>(stream));
}
#endif

struct GroupNormSizes {
    int64_t images, x_channels, skip_channels, positions, groups;
};

void check_sizes(const GroupNormSizes& s) {
    if (s.images < 0 || s.positions < 0) throw py::value_error("images and positions cannot be negative");
    if (s.x_channels < 1 || s.skip_channels < 0) throw py::value_error("x_channels must be at least 1, skip_channels at least 0");
    if (s.groups < 1 || (s.x_channels + s.skip_channels) % s.groups != 0)
        throw py::value_error("groups is " + std::to_string(s.groups) + ", but must divide the " +
                              std::to_string(s.x_channels + s.skip_channels) + " channels");
}

template <typename T>
void run_group_norm_silu(const std::array<uintptr_t, 9>& p, const GroupNormSizes& s, float eps, bool silu, bool channels_last,
                         int num_threads) {
    const auto values = [&p](int i) { return reinterpret_cast<const T*>(p[i]); };
    const auto numbers = [&p](int i) { return reinterpret_cast<const float*>(p[i]); };
    group_norm_silu(GroupNormSilu<T>{values(0), values(1), values(2), reinterpret_cast<T*>(p[3]), numbers(4), numbers(5),
                                     numbers(6), numbers(7), numbers(8), s.images, s.x_channels, s.skip_channels, s.positions,
                                     s.groups, eps, silu, channels_last},
                    num_threads);
}

void group_norm_silu_binding(const std::array<uintptr_t, 9>& pointers, const std::array<int64_t, 5>& sizes, float eps, bool silu,
                             bool channels_last, bool bf16, int num_threads) {
    const GroupNormSizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    check_sizes(s);
    if (num_threads < 1) throw py::value_error("num_threads is " + std::to_string(num_threads) + ", but must be at least 1");
    if (!(eps >= 0)) throw py::value_error("eps cannot be negative");
    if (s.images * s.positions == 0) return;
    for (const int required : {0, 3, 4, 5})
        if (pointers[required] == 0) throw py::value_error("x, out, weight and bias cannot be null pointers");
    if ((pointers[1] == 0) != (s.skip_channels == 0)) throw py::value_error("skip_channels does not fit skip");
    const auto run = bf16 ? run_group_norm_silu<bfloat16> : run_group_norm_silu<float>;
    run(pointers, s, eps, silu, channels_last, num_threads);
}

}  // namespace
}  // namespace ddim_fast

PYBIND11_MODULE(_native, module) {
    using namespace py::literals;
    module.doc() = "C++ and CUDA operators of ddim_fast on raw memory addresses";

    module.def("ddim_step", &ddim_fast::ddim_step_binding, "sample_ptr"_a, "model_output_ptr"_a, "noise_ptr"_a,
               "out_ptr"_a, "numel"_a, "coefficients"_a, "clip"_a, "num_threads"_a,
               py::call_guard<py::gil_scoped_release>(),
               R"(One DDIM update over arrays of fp32 in host memory.

    x0  = clamp(p * sample + q * model_output, -clip, clip)
    eps = r * sample + s * model_output
    out = u * x0 + v * eps + sigma * noise

Each operation is rounded by itself in this order: plain fp32 tensor operations give the same bits.

sample_ptr, model_output_ptr, out_ptr: addresses of numel values; out may be exactly one of the inputs.
noise_ptr: address of numel values, or 0 to leave the last term out.
coefficients: the seven numbers (p, q, r, s, u, v, sigma).
clip: a positive number, inf for no clipping. NaN stays NaN.
num_threads: how many threads may share the work; small arrays use fewer.

Raises ValueError for a null address, a negative numel, a wrong number of coefficients, or a clip or num_threads that
is not positive.)");

    module.def("group_norm_silu", &ddim_fast::group_norm_silu_binding, "pointers"_a, "sizes"_a, "eps"_a, "silu"_a,
               "channels_last"_a, "bf16"_a, "num_threads"_a, py::call_guard<py::gil_scoped_release>(),
               R"(GroupNorm over host memory, with what stands around it in a U-Net.

    v   = concat(x, skip) + pre_shift
    y   = (v - mean) / sqrt(var + eps) * weight + bias
    out = silu(y * (1 + scale) + shift) + residual

pointers: addresses of x, skip, residual, out, weight, bias, pre_shift, scale, shift; 0 leaves an optional one out. The
    first four are fp32, or bf16 if `bf16`; weight and bias are fp32 of one value a channel, the last three fp32 of one
    value an image and channel.
sizes: images, channels of x, channels of skip, positions (height * width), groups.
channels_last: whether x, skip, residual and out are (images, positions, channels) in memory.
num_threads: how many threads may share the work. Neither it nor the number of images changes a bit of the result.

Raises ValueError for null addresses and sizes that do not fit.)");

#ifdef DDIM_FAST_WITH_CUDA
    module.def("ddim_step_cuda", &ddim_fast::ddim_step_cuda_binding, "sample_ptr"_a, "model_output_ptr"_a,
               "noise_ptr"_a, "out_ptr"_a, "numel"_a, "coefficients"_a, "clip"_a, "stream"_a,
               py::call_guard<py::gil_scoped_release>(),
               R"(ddim_step over arrays on the current CUDA device.

stream: the address of a cudaStream_t (torch.cuda.current_stream().cuda_stream). The work is queued there and not
waited for; it can be captured in a CUDA graph, which keeps the coefficients it was captured with.

Raises ValueError as ddim_step does, and RuntimeError when the launch fails.)");
#endif
}
