#include "attention.h"

#include <algorithm>

#include "attention_kernel.h"
#include "parallel.h"

namespace ddim_fast {
namespace {

template <typename T>
void run_parallel(const Attention<T>& op, int num_threads, void (*run)(const Attention<T>&, const Queries&, float*)) {
    const int64_t heads = op.images * op.heads;
    if (heads == 0) return;
    // Of few heads, each thread gets a part of the queries: whole vectors of every instruction set.
    const int64_t parts = std::max(divide_up(op.queries, kBlock), divide_up(num_threads, heads));
    const int64_t count = std::clamp<int64_t>(round_up(divide_up(op.queries, parts), 16), 16, kBlock);
    const int64_t blocks = divide_up(op.queries, count);
    parallel_for(heads * blocks, 1, num_threads, [&](int64_t begin, int64_t end) {
        float* const scratch = reinterpret_cast<float*>(scratch_memory(attention_scratch(op) * sizeof(float)));
        for (int64_t task = begin; task < end; ++task) {
            const int64_t head = task / blocks, first = task % blocks * count;
            run(op, {head / op.heads, head % op.heads, first, std::min(count, op.queries - first)}, scratch);
        }
    });
}

}  // namespace

void attention(const Attention<float>& op, int num_threads) {
    using Run = void (*)(const Attention<float>&, const Queries&, float*);
    run_parallel(op, num_threads, DDIM_FAST_CHOOSE(Run, attend));
}

void attention(const Attention<bfloat16>& op, int num_threads) {
    using Run = void (*)(const Attention<bfloat16>&, const Queries&, float*);
    run_parallel(op, num_threads, DDIM_FAST_CHOOSE(Run, attend));
}

}  // namespace ddim_fast
