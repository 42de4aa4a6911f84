// The part of attention that is compiled once for each instruction set.
#pragma once

#include "attention.h"
#include "instruction_set.h"
#include "tile.h"

namespace ddim_fast {

// Up to kBlock queries of one head.
struct Queries {
    int64_t image, head, first, count;
};

// A task's memory in floats: the queries, (dim, kBlock), the probabilities, (keys, kBlock), and the result, (dim, kBlock).
template <typename T>
constexpr int64_t attention_scratch(const Attention<T>& op) {
    return (2 * op.dim + op.keys) * kBlock;
}

DDIM_FAST_DECLARE_EACH(void attend(const Attention<float>& op, const Queries& queries, float* scratch);
                       void attend(const Attention<bfloat16>& op, const Queries& queries, float* scratch);)

}  // namespace ddim_fast
