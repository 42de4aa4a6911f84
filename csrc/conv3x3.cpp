#include "conv3x3.h"

#include <algorithm>
#include <cmath>

#include "conv3x3_kernel.h"
#include "parallel.h"
#include "weights.h"

namespace ddim_fast {
namespace {

// Tiles a task: enough that its products outweigh reading the weights, few enough that what they need stays in the
// second-level cache.
constexpr int64_t tiles_a_task(int tile) { return tile == 4 ? 36 : 72; }

template <typename T, typename W = T>
using RunTiles = void (*)(const Conv3x3<T, W>& op, const Part& part, void* scratch);

template <typename T, typename W>
void run_parallel(const Conv3x3<T, W>& op, int num_threads, RunTiles<T, W> run) {
    const int64_t tiles = op.images * tiles_along(op, op.height) * tiles_along(op, op.width);
    if (tiles == 0) return;
    const Division division(tiles, op.out_channels, tiles_a_task(op.tile), num_threads);
    const Scratch<T, W> scratch(op, division.most_rows());
    parallel_for(division.tasks(), 1, num_threads, [&](int64_t begin, int64_t end) {
        char* const memory = scratch_memory(scratch.bytes);
        for (int64_t task = begin; task < end; ++task) run(op, division.part(task), memory);
    });
}

// One side of G g G^T: three numbers become four, or six.
void transform_weights(const double* g, int64_t stride, double* out, int64_t out_stride, int tile) {
    const double g0 = g[0], g1 = g[stride], g2 = g[2 * stride];
    const auto at = [=](double x) { return g0 + x * g1 + x * x * g2; };
    if (tile == 2) {
        const double values[4] = {g0, at(1) / 2, at(-1) / 2, g2};
        for (int i = 0; i < 4; ++i) out[i * out_stride] = values[i];
    } else {
        constexpr double a = kWinogradA, b = kWinogradB;
        const double n0 = a * a * b * b, na = 2 * a * a * (a * a - b * b), nb = 2 * b * b * (b * b - a * a);
        const double values[6] = {g0 / n0, at(a) / na, at(-a) / na, at(b) / nb, at(-b) / nb, g2};
        for (int i = 0; i < 6; ++i) out[i * out_stride] = values[i];
    }
}

// Calls visit(component, c, value) for the weights of output channel k.
template <typename Visit>
void for_each_component(const float* weight, int64_t k, int64_t in_channels, int tile, const Visit& visit) {
    const int side = tile + 2;
    for (int64_t c = 0; c < in_channels; ++c) {
        double g[9], half[18], whole[36];
        for (int i = 0; i < 9; ++i) g[i] = weight[(k * in_channels + c) * 9 + i];
        for (int j = 0; j < 3; ++j) transform_weights(g + j, 3, half + j, 3, tile);
        for (int i = 0; i < side; ++i) transform_weights(half + 3 * i, 1, whole + side * i, 1, tile);
        for (int i = 0; i < side * side; ++i) visit(i, c, static_cast<float>(whole[i]));
    }
}

template <typename T>
void prepare(const float* weight, T* out, int64_t out_channels, int64_t in_channels, int tile) {
    for (int64_t k = 0; k < out_channels; ++k)
        for_each_component(weight, k, in_channels, tile, [&](int64_t component, int64_t c, float value) {
            write(place_of_weight(out, component, k, c, out_channels, in_channels), value);
        });
}

template <typename T>
void run_int8(const Conv3x3<T, int8_t>& op, int num_threads) {
#ifdef DDIM_FAST_X86
    RunTiles<T, int8_t> run = avxvnni::run_tiles;
    if (has_avx512_vnni()) run = avx512vnni::run_tiles;
    run_parallel(op, num_threads, run);
#endif
}

}  // namespace

bool conv3x3_has_bf16() { return has_avx512_bf16(); }

// In AVX-512's place, AVX-VNNI would find its weights in another order.
bool conv3x3_has_int8() { return has_avx512_vnni() || (instruction_set() == InstructionSet::avx2 && has_avx_vnni()); }

void conv3x3(const Conv3x3<float>& op, int num_threads) {
    run_parallel(op, num_threads, DDIM_FAST_CHOOSE(RunTiles<float>, run_tiles));
}

void conv3x3(const Conv3x3<bfloat16>& op, int num_threads) {
#ifdef DDIM_FAST_X86
    run_parallel<bfloat16, bfloat16>(op, num_threads, avx512bf16::run_tiles);
#endif
}

void conv3x3(const Conv3x3<float, int8_t>& op, int num_threads) { run_int8(op, num_threads); }

void conv3x3(const Conv3x3<bfloat16, int8_t>& op, int num_threads) { run_int8(op, num_threads); }

void prepare_conv3x3(const float* weight, float* out, int64_t out_channels, int64_t in_channels, int tile) {
    prepare(weight, out, out_channels, in_channels, tile);
}

void prepare_conv3x3(const float* weight, bfloat16* out, int64_t out_channels, int64_t in_channels) {
    prepare(weight, out, out_channels, in_channels, 2);
}

void prepare_conv3x3(const float* weight, const float* steps, int8_t* out, float* units, int32_t* start, int64_t out_channels,
                     int64_t in_channels) {
    for (int64_t k = 0; k < out_channels; ++k) {
        float largest[16] = {};
        int32_t sum[16] = {};
        for_each_component(weight, k, in_channels, 2, [&](int64_t component, int64_t, float value) {
            largest[component] = std::max(largest[component], std::abs(value));
        });
        for_each_component(weight, k, in_channels, 2, [&](int64_t component, int64_t c, float value) {
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
