#include "product.h"

#include <algorithm>

#include "parallel.h"
#include "product_kernel.h"
#include "weights.h"

namespace ddim_fast {
namespace {

// Rows a task: their numbers, which every block of columns reads again, stay in the second-level cache.
constexpr int64_t kRows = 72, kRowBytes = 1 << 18;

template <typename T>
void run_parallel(const Product<T>& op, int num_threads, void (*run)(const Product<T>&, const Part&, char*)) {
    const int64_t rows = op.images * op.out_height * op.out_width;
    if (rows == 0) return;
    const int64_t fit = kRowBytes / (padded_depth(op) * static_cast<int64_t>(sizeof(T)));
    const Division division(rows, op.out_channels, std::clamp(fit / kTileGroup * kTileGroup, kTileGroup, kRows), num_threads);
    const ProductScratch<T> scratch(op, division.most_rows());
    parallel_for(division.tasks(), 1, num_threads, [&](int64_t begin, int64_t end) {
        char* const memory = scratch_memory(scratch.bytes);
        for (int64_t task = begin; task < end; ++task) run(op, division.part(task), memory);
    });
}

template <typename T>
void prepare(const float* weight, T* out, int64_t out_channels, int64_t depth) {
    const int64_t columns = padded_columns(out_channels), rows = sizeof(T) == 2 ? round_up(depth, 2) : depth;
    for (int64_t column = 0; column < columns; ++column)
        for (int64_t k = 0; k < rows; ++k) {
            const bool there = column < out_channels && k < depth;
            write(place_of_weight(out, 0, column, k, columns, rows), there ? weight[column * depth + k] : 0.0f);
        }
}

}  // namespace

int64_t prepared_product_numbers(int64_t out_channels, int64_t depth) {
    return padded_columns(out_channels) * round_up(depth, 2);
}

void prepare_product(const float* weight, float* out, int64_t out_channels, int64_t depth) {
    prepare(weight, out, out_channels, depth);
}

void prepare_product(const float* weight, bfloat16* out, int64_t out_channels, int64_t depth) {
    prepare(weight, out, out_channels, depth);
}

void product(const Product<float>& op, int num_threads) {
    using Run = void (*)(const Product<float>&, const Part&, char*);
    run_parallel(op, num_threads, DDIM_FAST_CHOOSE(Run, multiply_rows));
}

void product(const Product<bfloat16>& op, int num_threads) {
#ifdef DDIM_FAST_X86
    run_parallel<bfloat16>(op, num_threads, avx512bf16::multiply_rows);
#endif
}

}  // namespace ddim_fast
