// The Python module ddim_fast._native. It takes addresses, not tensors, so it fits every version of torch and serves
// numpy and ONNX Runtime as well; whoever calls it keeps the arrays alive and of the stated size.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "ddim_step.h"

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
