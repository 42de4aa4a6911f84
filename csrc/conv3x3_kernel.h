// The part of conv3x3 that is compiled once for each instruction set.
#pragma once

#include "conv3x3.h"
#include "instruction_set.h"
#include "tile.h"

namespace ddim_fast {

// A task's memory, of cache lines: a pixel's worth of zeros; the transformed pixels, (components, rows, in_channels); the sums,
// (components, rows, kBlock). A line more between components keeps them from falling on the same sets of a cache.
template <typename T, typename W>
struct Scratch {
    Scratch(const Conv3x3<T, W>& op, int64_t tiles)
        : rows((tiles + kTileGroup - 1) / kTileGroup * kTileGroup),
          pixel_stride(rows * op.in_channels + kLine / sizeof(W)),
          sum_stride(rows * kBlock + kLine / sizeof(float)),
          zeros_bytes(whole_lines(op.in_channels * sizeof(T))),
          pixel_bytes(whole_lines(components(op.tile) * pixel_stride * sizeof(W))),
          bytes(zeros_bytes + pixel_bytes + components(op.tile) * sum_stride * sizeof(float)) {}

    static constexpr int64_t kLine = 64;
    static constexpr int64_t whole_lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

    int64_t rows, pixel_stride, sum_stride, zeros_bytes, pixel_bytes, bytes;
};

// run_tiles: `scratch` begins with a cache line, and has room for the part.
DDIM_FAST_DECLARE_EACH(void run_tiles(const Conv3x3<float>& op, const Part& part, void* scratch);)

#ifdef DDIM_FAST_X86
namespace avx512bf16 {
void run_tiles(const Conv3x3<bfloat16>& op, const Part& part, void* scratch);
}
namespace avx512vnni {
void run_tiles(const Conv3x3<float, int8_t>& op, const Part& part, void* scratch);
void run_tiles(const Conv3x3<bfloat16, int8_t>& op, const Part& part, void* scratch);
}  // namespace avx512vnni
namespace avxvnni {
void run_tiles(const Conv3x3<float, int8_t>& op, const Part& part, void* scratch);
void run_tiles(const Conv3x3<bfloat16, int8_t>& op, const Part& part, void* scratch);
}  // namespace avxvnni
#endif

}  // namespace ddim_fast
