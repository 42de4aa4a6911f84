#include "conv3x3.h"

#include <algorithm>
#include <cmath>
#include <memory>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DDIM_FAST_X86
#include <immintrin.h>
#endif

// See group_norm_silu.cpp.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

#include "parallel.h"

namespace ddim_fast {
namespace {

// Output channels whose weights lie together: the products of a component with them stay in the first-level cache.
constexpr int64_t kBlock = 64;

// Tiles a task: enough that its products outweigh reading the weights, few enough that what they need stays in the
// second-level cache.
constexpr int64_t kTiles = 72;

// A task's tiles are multiples of this, the most that any kernel computes together.
constexpr int64_t kGroup = 6;

template <typename W>
constexpr bool kInt8 = sizeof(W) == 1;

template <typename T, typename W>
int64_t tile_rows(const Conv3x3<T, W>& op) {
    return op.upsample ? op.height : (op.height + 1) / 2;
}

template <typename T, typename W>
int64_t tile_columns(const Conv3x3<T, W>& op) {
    return op.upsample ? op.width : (op.width + 1) / 2;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace ddim_fast

#define DDIM_FAST_KERNEL "conv3x3_kernel.h"
#include "each_cpu.h"

#ifdef DDIM_FAST_X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")
#define DDIM_FAST_VECTOR_BITS 512
#define DDIM_FAST_BF16
namespace ddim_fast::avx512bf16 {
#include "vector.h"
#include "conv3x3_kernel.h"
}  // namespace ddim_fast::avx512bf16
#undef DDIM_FAST_BF16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vnni,prefer-vector-width=512")
#define DDIM_FAST_INT8
namespace ddim_fast::avx512vnni {
#include "vector.h"
#include "conv3x3_kernel.h"
}  // namespace ddim_fast::avx512vnni
#undef DDIM_FAST_INT8
#undef DDIM_FAST_VECTOR_BITS
#pragma GCC pop_options
#endif

namespace ddim_fast {
namespace {

template <typename T, typename W>
int64_t scratch_bytes(const Conv3x3<T, W>& op, int64_t tiles) {
    return op.in_channels * sizeof(T) + 16 * tiles * (op.in_channels * sizeof(W) + kBlock * sizeof(float));
}

template <typename T, typename W>
void run_parallel(const Conv3x3<T, W>& op, int num_threads,
                  void (*run)(const Conv3x3<T, W>&, int64_t, int64_t, int64_t, int64_t, void*)) {
    const int64_t tiles = op.images * tile_rows(op) * tile_columns(op), groups = divide_up(tiles, kGroup);
    if (tiles == 0) return;
    // A task is a run of tiles and, where those are few, a part of the output channels: then each thread reads its own weights.
    const int64_t blocks = divide_up(op.out_channels, kBlock);
    int64_t runs = divide_up(tiles, kTiles), splits = 1;
    if (runs < num_threads) splits = std::min(blocks, divide_up(num_threads, runs));
    runs = std::min(groups, divide_up(runs * splits, num_threads) * num_threads / splits);
    const int64_t bytes = scratch_bytes(op, divide_up(groups, runs) * kGroup);
    parallel_for(runs * splits, 1, num_threads, [&](int64_t begin, int64_t end) {
        constexpr uintptr_t kLine = 64;
        const std::unique_ptr<char[]> memory(new char[bytes + kLine]);
        char* scratch = memory.get() + (kLine - reinterpret_cast<uintptr_t>(memory.get()) % kLine);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t part = task / splits, split = task % splits;
            const int64_t first = groups * part / runs * kGroup, last = groups * (part + 1) / runs * kGroup;
            run(op, first, std::min(last, tiles), blocks * split / splits, blocks * (split + 1) / splits, scratch);
        }
    });
}

void write(float* p, float value) { *p = value; }

void write(bfloat16* p, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    p->bits = static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// One side of G g G^T: three numbers become four.
template <typename T>
void transform_weights(const T* g, int64_t stride, double* out, int64_t out_stride) {
    const double g0 = g[0], g1 = g[stride], g2 = g[2 * stride];
    const double values[4] = {g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2};
    for (int i = 0; i < 4; ++i) out[i * out_stride] = values[i];
}

// Calls visit(component, c, value) for the weights of output channel k.
template <typename Visit>
void for_each_component(const float* weight, int64_t k, int64_t in_channels, const Visit& visit) {
    for (int64_t c = 0; c < in_channels; ++c) {
        double half[4][3], components[4][4];
        for (int j = 0; j < 3; ++j) transform_weights(weight + (k * in_channels + c) * 9 + j, 3, &half[0][j], 3);
        for (int i = 0; i < 4; ++i) transform_weights(half[i], 1, components[i], 1);
        for (int i = 0; i < 16; ++i) visit(i, c, static_cast<float>(components[i / 4][i % 4]));
    }
}

// Where a weight lies: (16 components, blocks of output channels, input channels, output channels of the block), but as many
// input channels beside each other as fill 32 bits.
template <typename W>
W* place_of_weight(W* out, int64_t component, int64_t k, int64_t c, int64_t out_channels, int64_t in_channels) {
    constexpr int64_t kBeside = sizeof(float) / sizeof(W);
    const int64_t first = k / kBlock * kBlock, columns = std::min(kBlock, out_channels - first);
    return out + (component * out_channels + first) * in_channels + (c / kBeside * columns + k - first) * kBeside + c % kBeside;
}

template <typename T>
void prepare(const float* weight, T* out, int64_t out_channels, int64_t in_channels) {
    for (int64_t k = 0; k < out_channels; ++k)
        for_each_component(weight, k, in_channels, [&](int64_t component, int64_t c, float value) {
            write(place_of_weight(out, component, k, c, out_channels, in_channels), value);
        });
}

}  // namespace

namespace {

bool has_avx512() {
#ifdef DDIM_FAST_X86
    return DDIM_FAST_FOR_THIS_CPU(run_tiles<float, float>) == avx512::run_tiles<float, float>;
#else
    return false;
#endif
}

}  // namespace

bool conv3x3_has_bf16() {
#ifdef DDIM_FAST_X86
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

bool conv3x3_has_int8() {
#ifdef DDIM_FAST_X86
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

void conv3x3(const Conv3x3<float>& op, int num_threads) {
    run_parallel(op, num_threads, DDIM_FAST_FOR_THIS_CPU(run_tiles<float, float>));
}

void conv3x3(const Conv3x3<bfloat16>& op, int num_threads) {
#ifdef DDIM_FAST_X86
    run_parallel(op, num_threads, avx512bf16::run_tiles<bfloat16, bfloat16>);
#endif
}

void conv3x3(const Conv3x3<float, int8_t>& op, int num_threads) {
#ifdef DDIM_FAST_X86
    run_parallel(op, num_threads, avx512vnni::run_tiles<float, int8_t>);
#endif
}

void conv3x3(const Conv3x3<bfloat16, int8_t>& op, int num_threads) {
#ifdef DDIM_FAST_X86
    run_parallel(op, num_threads, avx512vnni::run_tiles<bfloat16, int8_t>);
#endif
}

void prepare_conv3x3(const float* weight, float* out, int64_t out_channels, int64_t in_channels) {
    prepare(weight, out, out_channels, in_channels);
}

void prepare_conv3x3(const float* weight, bfloat16* out, int64_t out_channels, int64_t in_channels) {
    prepare(weight, out, out_channels, in_channels);
}

void prepare_conv3x3(const float* weight, const float* steps, int8_t* out, float* units, int32_t* start, int64_t out_channels,
                     int64_t in_channels) {
    for (int64_t k = 0; k < out_channels; ++k) {
        float largest[16] = {};
        int32_t sum[16] = {};
        for_each_component(weight, k, in_channels, [&](int64_t component, int64_t, float value) {
            largest[component] = std::max(largest[component], std::abs(value));
        });
        for_each_component(weight, k, in_channels, [&](int64_t component, int64_t c, float value) {
            const float scaled = largest[component] > 0 ? value / largest[component] * 127 : 0;
            const auto whole = static_cast<int8_t>(std::nearbyint(scaled));
            *place_of_weight(out, component, k, c, out_channels, in_channels) = whole;
            sum[component] += whole;
        });
        for (int64_t component = 0; component < 16; ++component) {
            units[component * out_channels + k] = largest[component] / 127 / steps[component];
            start[component * out_channels + k] = -128 * sum[component];
        }
    }
}

}  // namespace ddim_fast
