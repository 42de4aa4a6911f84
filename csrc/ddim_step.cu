#include "ddim_step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace ddim_fast {
namespace {

constexpr int kThreads = 256;

// More than any GPU runs at once; longer arrays go round the grid-stride loop again.
constexpr int64_t kMaxBlocks = 4096;

// kWidth values that move in one memory access.
template <int kWidth>
struct alignas(kWidth * sizeof(float)) Pack {
    float lane[kWidth];
};

// No __restrict__: out may be one of the inputs.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) ddim_step_kernel(DdimArrays a, DdimCoefficients c, float clip) {
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    const int64_t packs = a.numel / kWidth;

    for (int64_t i = first; i < packs; i += stride) {
        const auto x = reinterpret_cast<const Pack<kWidth>*>(a.sample)[i];
        const auto m = reinterpret_cast<const Pack<kWidth>*>(a.model_output)[i];
        Pack<kWidth> out;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) out.lane[j] = ddim_step_element(x.lane[j], m.lane[j], c, clip);
        if (a.noise != nullptr) {
            const auto z = reinterpret_cast<const Pack<kWidth>*>(a.noise)[i];
#pragma unroll
            for (int j = 0; j < kWidth; ++j) out.lane[j] += c.sigma * z.lane[j];
        }
        reinterpret_cast<Pack<kWidth>*>(a.out)[i] = out;
    }

    // The last numel % kWidth values.
    for (int64_t i = packs * kWidth + first; i < a.numel; i += stride) {
        float out = ddim_step_element(a.sample[i], a.model_output[i], c, clip);
        if (a.noise != nullptr) out += c.sigma * a.noise[i];
        a.out[i] = out;
    }
}

bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <int kWidth>
void launch(const DdimArrays& arrays, const DdimCoefficients& coefficients, float clip, cudaStream_t stream) {
    const int64_t items = (arrays.numel + kWidth - 1) / kWidth;
    const int64_t blocks = std::min((items + kThreads - 1) / kThreads, kMaxBlocks);
    ddim_step_kernel<kWidth><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arrays, coefficients, clip);
}

}  // namespace

void ddim_step_cuda(const DdimArrays& arrays, const DdimCoefficients& coefficients, float clip, void* stream) {
    if (arrays.numel == 0) return;  // a grid of no blocks is a launch error

    constexpr int kWidth = 4;  // 16 bytes, the widest access there is
    bool aligned = true;
    for (const void* pointer : {static_cast<const void*>(arrays.sample), static_cast<const void*>(arrays.model_output),
                                static_cast<const void*>(arrays.noise), static_cast<const void*>(arrays.out)})
        aligned = aligned && is_aligned(pointer, sizeof(Pack<kWidth>));

    (aligned ? launch<kWidth> : launch<1>)(arrays, coefficients, clip, static_cast<cudaStream_t>(stream));
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string("ddim_step_cuda: ") + cudaGetErrorString(error));
}

}  // namespace ddim_fast
