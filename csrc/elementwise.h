// Arithmetic on elements of strided arrays: what stands between the operators of a recorded run, see plan.h.
#pragma once

#include <array>
#include <cstdint>

#include "common.h"

namespace ddim_fast {

enum class Arithmetic : int {
    fill,      // number
    copy,      // a
    add,       // a + number b
    multiply,  // a b
    divide,    // a / b
    clamp,     // a, at least `number` and at most `most`; NaN stays NaN
    lerp,      // a + c (b - a), from b where that is the nearer end
    addcmul,   // a + number (b c)
};

constexpr int kDimensions = 4;

// Fp32 or bf16 numbers; strides are in numbers, 0 where all share one.
struct Operand {
    void* data;
    Dtype dtype;
    std::array<int64_t, kDimensions> strides;
};

// In fp32, each operation rounded by itself, and rounded once more to the dtype of out. out may be exactly one of the inputs.
struct Elementwise {
    Arithmetic arithmetic;
    std::array<int64_t, kDimensions> sizes;
    std::array<Operand, 3> inputs;
    Operand out;
    float number;
    float most;
};

// How many of the inputs are read.
constexpr int inputs_of(Arithmetic arithmetic) {
    constexpr int kInputs[] = {0, 1, 2, 2, 2, 1, 3, 3};
    return kInputs[static_cast<int>(arithmetic)];
}

void elementwise(const Elementwise& op, int num_threads);

}  // namespace ddim_fast
