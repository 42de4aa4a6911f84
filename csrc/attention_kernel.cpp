// The attention of some queries of one head. Compiled once for each instruction set: see instruction_set.h.
//
// Queries lie along the lanes of vectors. So keys and values are read where they are, one number for all lanes, and softmax
// takes the same steps in each lane.
#include "attention_kernel.h"

#include "multiply.h"

namespace ddim_fast::DDIM_FAST_ISA {
namespace {

// out = a b for `width` columns, whole vectors. The last group of rows overlaps the one before it; what both compute is the
// same.
template <typename A>
DDIM_FAST_INLINE void multiply_all(Left<A> a, int64_t rows, int64_t depth, const float* b, int64_t width, float* out) {
    constexpr int64_t kStrip = kVectors * kLanes;
    if (rows < kTileGroup) {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t c = 0; c < width; c += kLanes) {
                Vector sum = {};
                for (int64_t k = 0; k < depth; ++k)
                    sum += broadcast(to_float(a.at[row * a.row_stride + k * a.k_stride])) * load(b + k * kBlock + c);
                store(out + row * kBlock + c, sum);
            }
        return;
    }
    for (int64_t k = 0; k < width; k += kStrip)
        for (int64_t i = 0; i < rows; i += kTileGroup) {
            const int64_t row = smaller(i, rows - kTileGroup);
            multiply_up_to<kVectors>(Left<A>{a.at + row * a.row_stride, a.row_stride, a.k_stride}, depth, b + k, kBlock,
                                     smaller(kStrip, width - k), out + row * kBlock + k, Aside<float>{});
        }
}

// scores <- e^(scale score - the greatest of the column); returns their sums, each of chains as products are.
DDIM_FAST_INLINE Vector exponentials(float* scores, int64_t keys, float scale) {
    Vector most = load(scores) * scale;
    for (int64_t i = 1; i < keys; ++i) {
        const Vector v = load(scores + i * kBlock) * scale;
        most = v > most ? v : most;
    }
    Vector sum = {};
    for (int64_t begin = 0; begin < keys; begin += kChain) {
        Vector chain = {};
        for (int64_t i = begin; i < smaller(begin + kChain, keys); ++i) {
            const Vector p = exponential(load(scores + i * kBlock) * scale - most);
            store(scores + i * kBlock, p);
            chain += p;
        }
        sum += chain;
    }
    return sum;
}

template <typename T>
DDIM_FAST_INLINE void run(const Attention<T>& op, const Queries& q, float* scratch) {
    float* const columns = scratch;
    float* const scores = columns + op.dim * kBlock;
    float* const sums = scores + op.keys * kBlock;
    const auto start = [&q](const auto* p, TokenStrides s) { return p + q.image * s.image + q.head * s.head; };
    const int64_t width = divide_up(q.count, kLanes) * kLanes;
    for (int64_t i = 0; i < width; ++i) {
        const T* const token = start(op.query, op.query_strides) + (q.first + smaller(i, q.count - 1)) * op.query_strides.token;
        for (int64_t d = 0; d < op.dim; ++d) columns[d * kBlock + i] = to_float(token[d]);
    }
    const T* const key = start(op.key, op.key_strides);
    const T* const value = start(op.value, op.value_strides);
    multiply_all(Left<T>{key, op.key_strides.token, 1}, op.keys, op.dim, columns, width, scores);
    // The queries are not needed any more; their first row takes the sums of the exponentials.
    for (int64_t i = 0; i < width; i += kLanes) store(columns + i, exponentials(scores + i, op.keys, op.scale));
    multiply_all(Left<T>{value, 1, op.value_strides.token}, op.dim, op.keys, scores, width, sums);
    T* const out = op.out + q.image * op.out_strides.image + q.head * op.out_strides.head;
    for (int64_t i = 0; i < q.count; ++i) {
        T* const token = out + (q.first + i) * op.out_strides.token;
        const float share = 1.0f / columns[i];
        for (int64_t d = 0; d < op.dim; d += kLanes) {
            float lanes[kLanes] = {};
            const int64_t count = smaller(kLanes, op.dim - d);
            for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = sums[(d + lane) * kBlock + i] * share;
            if (count == kLanes)
                store(token + d, load(lanes));
            else
                store_some(token + d, load(lanes), count);
        }
    }
}

}  // namespace

__attribute__((flatten)) void attend(const Attention<float>& op, const Queries& queries, float* scratch) {
    run(op, queries, scratch);
}

__attribute__((flatten)) void attend(const Attention<bfloat16>& op, const Queries& queries, float* scratch) {
    run(op, queries, scratch);
}

}  // namespace ddim_fast::DDIM_FAST_ISA
