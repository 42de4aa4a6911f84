#include "ddim_step.h"

#include <algorithm>
#include <cmath>

#include "device.h"
#include "philox.h"

namespace ddim_fast {

#include "ddim_step_element.h"

namespace {

constexpr int kThreads = 256;

// More than any GPU runs at once; longer arrays go round the grid-stride loop again.
constexpr int64_t kMaxBlocks = 4096;

// kWidth neighbouring values as they lie in memory, those of 16 bits in the first half. Loads leave them as they are, so
// that all are under way before the first is converted and waited for.
template <int kWidth>
struct alignas(16) Raw {
    uint32_t word[kWidth];
};

template <int kWidth>
__device__ __forceinline__ Raw<kWidth> load(const void* base, Dtype dtype, int64_t i) {
    Raw<kWidth> raw = {};
    if (dtype == Dtype::fp32)
        copy<4 * kWidth>(raw.word, static_cast<const float*>(base) + i);
    else
        copy<2 * kWidth>(raw.word, static_cast<const uint16_t*>(base) + i);
    return raw;
}

template <int kWidth>
__device__ __forceinline__ void unpack(const Raw<kWidth>& raw, Dtype dtype, float (&value)[kWidth]) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const auto half = static_cast<unsigned short>(raw.word[j / 2] >> (j % 2 * 16));
        value[j] = dtype == Dtype::fp32   ? __uint_as_float(raw.word[j])
                   : dtype == Dtype::bf16 ? __uint_as_float(uint32_t(half) << 16)
                                          : __half2float(__ushort_as_half(half));
    }
}

template <int kWidth>
__device__ __forceinline__ void store(void* base, Dtype dtype, int64_t i, const float (&value)[kWidth]) {
    if (dtype == Dtype::fp32) {
        write_global<4 * kWidth>(static_cast<float*>(base) + i, value);
        return;
    }
    Raw<kWidth> raw = {};
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const uint32_t half = dtype == Dtype::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value[j]))
                                                   : __half_as_ushort(__float2half_rn(value[j]));
        raw.word[j / 2] |= half << (j % 2 * 16);
    }
    write_global<2 * kWidth>(static_cast<uint16_t*>(base) + i, raw.word);
}

// The noise of elements [i, i + kWidth), which are of one image and, but for a single one, whole blocks.
template <int kWidth>
__device__ __forceinline__ void draw(const DdimStep& op, uint32_t step, int64_t i, float (&z)[kWidth]) {
    const int64_t image = i / op.image_numel, element = i % op.image_numel;
#pragma unroll
    for (int j = 0; j < kWidth; j += 4) {
        const uint32_t block = static_cast<uint32_t>((element + j) / 4);
        const Normals normals = fast_normals(noise_words(op.seeds[image], step, block));
        if constexpr (kWidth == 1) {
            const int k = element % 4;
            z[0] = k == 0 ? normals.value[0] : k == 1 ? normals.value[1] : k == 2 ? normals.value[2] : normals.value[3];
        } else {
            for (int k = 0; k < 4; ++k) z[j + k] = normals.value[k];
        }
    }
}

// Elements [i, i + kWidth). No __restrict__ anywhere: out may be one of the inputs.
template <int kWidth>
__device__ __forceinline__ void step_elements(const DdimStep& op, const DdimCoefficients& c, uint32_t step, int64_t i) {
    const auto raw_x = load<kWidth>(op.sample, op.sample_dtype, i);
    const auto raw_m = load<kWidth>(op.model_output, op.output_dtype, i);
    Raw<kWidth> raw_n = {}, raw_z = {};
    if (op.unconditional) raw_n = load<kWidth>(op.unconditional, op.output_dtype, i);
    if (op.noise) raw_z = load<kWidth>(op.noise, op.sample_dtype, i);

    float x[kWidth], m[kWidth], other[kWidth];
    alignas(16) float out[kWidth];
    unpack(raw_x, op.sample_dtype, x);
    unpack(raw_m, op.output_dtype, m);
    if (op.unconditional) {
        unpack(raw_n, op.output_dtype, other);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) m[j] = other[j] + op.guidance * (m[j] - other[j]);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out[j] = ddim_step_element(x[j], m[j], c, op.clip);
    const bool drawn = op.seeds && c.sigma != 0;
    if (op.noise) unpack(raw_z, op.sample_dtype, other);
    if (drawn) draw(op, step, i, other);
    if (op.noise || drawn) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) out[j] += c.sigma * other[j];
    }
    store(op.out, op.out_dtype, i, out);
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads) ddim_step_kernel(DdimStep op, DdimTable table) {
    DdimCoefficients c = op.coefficients;
    uint32_t step = op.step;
    if (table.row) {
        const int64_t index = *table.index;
        if (index >= 0 && index < table.rows) {
            c = table.row[index];
            step = static_cast<uint32_t>(index);
        } else {
            c.prev_from_x0 = NAN;
        }
    }

    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t stride = int64_t(gridDim.x) * kThreads;
    const int64_t packs = op.numel / kWidth;
    for (int64_t i = first; i < packs; i += stride) step_elements<kWidth>(op, c, step, i * kWidth);
    // The last numel % kWidth elements.
    for (int64_t i = packs * kWidth + first; i < op.numel; i += stride) step_elements<1>(op, c, step, i);
}

// Whether kWidth elements of every array can move at once.
bool can_move(const DdimStep& op, int width) {
    const auto aligned = [width](const void* pointer, Dtype dtype) {
        return is_aligned(pointer, std::min(16, width * size_of(dtype)));
    };
    return (op.seeds == nullptr || op.image_numel % width == 0) && aligned(op.sample, op.sample_dtype) &&
           aligned(op.noise, op.sample_dtype) && aligned(op.model_output, op.output_dtype) &&
           aligned(op.unconditional, op.output_dtype) && aligned(op.out, op.out_dtype);
}

template <int kWidth>
void launch_width(const DdimStep& op, const DdimTable& table, void* stream) {
    const int64_t items = (op.numel + kWidth - 1) / kWidth;
    const int64_t blocks = std::min((items + kThreads - 1) / kThreads, kMaxBlocks);
    launch("ddim_step_cuda", ddim_step_kernel<kWidth>, blocks, kThreads, 0, stream, op, table);
}

}  // namespace

void ddim_step_cuda(const DdimStep& op, const DdimTable& table, void* stream) {
    if (op.numel == 0) return;  // a grid of no blocks is a launch error

    // An access of 16 bytes is the widest there is: four values of 32 bits or eight of 16.
    const bool all_fp32 = op.sample_dtype == Dtype::fp32 && op.output_dtype == Dtype::fp32 && op.out_dtype == Dtype::fp32;
    if (!all_fp32 && can_move(op, 8))
        launch_width<8>(op, table, stream);
    else if (can_move(op, 4))
        launch_width<4>(op, table, stream);
    else
        launch_width<1>(op, table, stream);
}

}  // namespace ddim_fast
