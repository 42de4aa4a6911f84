#include "conv3x3.h"

#include <algorithm>
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

template <typename T>
int64_t tile_rows(const Conv3x3<T>& op) {
    return op.upsample ? op.height : (op.height + 1) / 2;
}

template <typename T>
int64_t tile_columns(const Conv3x3<T>& op) {
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
#pragma GCC pop_options
#endif

namespace ddim_fast {
namespace {

template <typename T>
int64_t scratch_bytes(const Conv3x3<T>& op, int64_t tiles) {
    return ((16 * tiles + 1) * op.in_channels) * sizeof(T) + 16 * tiles * kBlock * sizeof(float);
}

template <typename T>
void run_parallel(const Conv3x3<T>& op, int num_threads, decltype(&baseline::run_tiles<T>) run) {
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

// (16 components, blocks of output channels, input channels, output channels of the block); pairs of input channels beside
// each other in bf16.
template <typename T>
void prepare(const float* weight, T* out, int64_t out_channels, int64_t in_channels) {
    constexpr int64_t kPair = sizeof(float) / sizeof(T);
    for (int64_t k = 0; k < out_channels; ++k) {
        const int64_t first = k / kBlock * kBlock, columns = std::min(kBlock, out_channels - first);
        for (int64_t c = 0; c < in_channels; ++c) {
            double half[4][3], components[4][4];
            for (int j = 0; j < 3; ++j) transform_weights(weight + (k * in_channels + c) * 9 + j, 3, &half[0][j], 3);
            for (int i = 0; i < 4; ++i) transform_weights(half[i], 1, components[i], 1);
            for (int i = 0; i < 16; ++i) {
                T* block = out + (i * out_channels + first) * in_channels;
                write(block + (c / kPair * columns + k - first) * kPair + c % kPair, static_cast<float>(components[i / 4][i % 4]));
            }
        }
    }
}

}  // namespace

bool conv3x3_has_bf16() {
#ifdef DDIM_FAST_X86
    return std::getenv("DDIM_FAST_CPU") == nullptr && __builtin_cpu_supports("avx512bf16") &&
           DDIM_FAST_FOR_THIS_CPU(run_tiles<float>) == avx512::run_tiles<float>;
#else
    return false;
#endif
}

void conv3x3(const Conv3x3<float>& op, int num_threads) { run_parallel(op, num_threads, DDIM_FAST_FOR_THIS_CPU(run_tiles<float>)); }

void conv3x3(const Conv3x3<bfloat16>& op, int num_threads) {
#ifdef DDIM_FAST_X86
    run_parallel(op, num_threads, avx512bf16::run_tiles<bfloat16>);
#endif
}

void prepare_conv3x3(const float* weight, float* out, int64_t out_channels, int64_t in_channels) {
    prepare(weight, out, out_channels, in_channels);
}

void prepare_conv3x3(const float* weight, bfloat16* out, int64_t out_channels, int64_t in_channels) {
    prepare(weight, out, out_channels, in_channels);
}

}  // namespace ddim_fast
