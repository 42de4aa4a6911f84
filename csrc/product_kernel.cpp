// The products of some rows and all columns of a part. Compiled once for each instruction set (see instruction_set.h), and once
// more for products of bf16.
#include "product_kernel.h"

#include "multiply.h"

namespace ddim_fast::DDIM_FAST_ISA {
namespace {

// The numbers that output position `row` is made of: those of its kernel's pixels, one pixel after the other, and zeros.
template <typename T>
void gather(const Product<T>& op, int64_t row, T* out) {
    const int64_t channels = op.in_channels, positions = op.out_height * op.out_width;
    const int64_t y = row % positions / op.out_width * op.stride_height - op.top;
    const int64_t x = row % op.out_width * op.stride_width - op.left;
    const T* const image = op.x + row / positions * op.height * op.width * channels;
    // Of each row of the kernel, the pixels inside of the image lie beside each other.
    const int64_t before = smaller(x < 0 ? -x : 0, op.kernel_width);
    const int64_t inside = smaller(op.kernel_width, op.width - x) - before;
    T* p = out;
    for (int64_t i = y; i < y + op.kernel_height; ++i, p += op.kernel_width * channels) {
        const int64_t there = i >= 0 && i < op.height && inside > 0 ? inside : 0;
        if (before > 0) memset(p, 0, before * channels * sizeof(T));
        const T* const from = image + (i * op.width + x + before) * channels;
        if (there > 0) memcpy(p + before * channels, from, there * channels * sizeof(T));
        const int64_t after = op.kernel_width - before - there;
        if (after > 0) memset(p + (before + there) * channels, 0, after * channels * sizeof(T));
    }
    memset(p, 0, (out + padded_depth(op) - p) * sizeof(T));
}

// bias + residual + sums, `columns` of a row from `first` on.
template <typename T>
DDIM_FAST_INLINE void write_row(const Product<T>& op, int64_t row, int64_t first, int64_t columns, const float* sums) {
    const int64_t at = row * op.out_channels + first;
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
        const Vector bias = op.bias ? load(op.bias + first + c) : Vector{};
        store(op.out + at + c, load(sums + c) + bias + (op.residual ? load(op.residual + at + c) : Vector{}));
    }
    if (c < columns) {
        const Vector bias = op.bias ? load_some(op.bias + first + c, columns - c) : Vector{};
        const Vector residual = op.residual ? load_some(op.residual + at + c, columns - c) : Vector{};
        store_some(op.out + at + c, load(sums + c) + bias + residual, columns - c);
    }
}

template <typename T>
DDIM_FAST_INLINE void run(const Product<T>& op, const Part& part, char* scratch) {
    const int64_t depth = padded_depth(op), columns = padded_columns(op.out_channels);
    const int64_t rows = round_up(part.end - part.begin, kTileGroup);
    const ProductScratch<T> place(op, rows);
    T* const gathered = reinterpret_cast<T*>(scratch);
    float* const sums = reinterpret_cast<float*>(scratch + place.row_bytes);
    // Rows of a linear layer stay where they are, but for a last, partial group.
    const bool is_linear = op.kernel_height * op.kernel_width * op.stride_height * op.stride_width == 1;
    const bool in_place = is_linear && depth == op.in_channels;
    const int64_t whole = in_place ? (part.end - part.begin) / kTileGroup * kTileGroup : 0;
    for (int64_t i = whole; i < rows; ++i) {
        if (part.begin + i < part.end)
            gather(op, part.begin + i, gathered + i * depth);
        else
            memset(gathered + i * depth, 0, depth * sizeof(T));
    }
    constexpr int64_t kStrip = kVectors * kLanes;
    const int64_t last = smaller(part.last_block * kBlock, op.out_channels);
    for (int64_t first = part.first_block * kBlock; first < last; first += kBlock) {
        const int64_t there = smaller(kBlock, columns - first);
        for (int64_t k = 0; k < there; k += kStrip) {
            const int64_t width = smaller(kStrip, there - k);
            for (int64_t i = 0; i < rows; i += kTileGroup) {
                const T* const a = i < whole ? op.x + (part.begin + i) * depth : gathered + i * depth;
                multiply_up_to<kVectors>(Left<T>{a, depth, 1}, depth, op.weight + (first + k) * depth, width, width,
                                         sums + i * kBlock + k, Aside<T>{});
            }
        }
        for (int64_t i = 0; i < part.end - part.begin; ++i)
            write_row(op, part.begin + i, first, smaller(kBlock, op.out_channels - first), sums + i * kBlock);
    }
}

}  // namespace

#ifdef __AVX512BF16__
__attribute__((flatten)) void multiply_rows(const Product<bfloat16>& op, const Part& part, char* scratch) {
    run(op, part, scratch);
}
#else
__attribute__((flatten)) void multiply_rows(const Product<float>& op, const Part& part, char* scratch) {
    run(op, part, scratch);
}

const int64_t strip_columns = kVectors * kLanes;
#endif

}  // namespace ddim_fast::DDIM_FAST_ISA
