// The part of product that is compiled once for each instruction set.
#pragma once

#include "instruction_set.h"
#include "product.h"
#include "tile.h"

namespace ddim_fast {

// Numbers of a row: bf16 is multiplied in pairs.
template <typename T>
constexpr int64_t padded_depth(const Product<T>& op) {
    const int64_t depth = op.kernel_height * op.kernel_width * op.in_channels;
    return sizeof(T) == 2 ? round_up(depth, 2) : depth;
}

// Columns of the weights: whole vectors of every instruction set.
constexpr int64_t padded_columns(int64_t out_channels) { return round_up(out_channels, 16); }

// A task's memory: rows of x, and sums.
template <typename T>
struct ProductScratch {
    ProductScratch(const Product<T>& op, int64_t rows)
        : row_bytes(round_up(rows * padded_depth(op) * sizeof(T), 64)), bytes(row_bytes + rows * kBlock * sizeof(float)) {}

    int64_t row_bytes, bytes;
};

// scratch: a cache line's start, with room for the part.
DDIM_FAST_DECLARE_EACH(void multiply_rows(const Product<float>& op, const Part& part, char* scratch);)

#ifdef DDIM_FAST_X86
namespace avx512bf16 {
void multiply_rows(const Product<bfloat16>& op, const Part& part, char* scratch);
}
#endif

}  // namespace ddim_fast
