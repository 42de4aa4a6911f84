// The part of elementwise that is compiled once for each instruction set.
#pragma once

#include "elementwise.h"
#include "instruction_set.h"

namespace ddim_fast {

// `count` elements along the last dimension, from number `first` on, of the row at these offsets of inputs and out.
struct ElementRow {
    int64_t inputs[3];
    int64_t out;
    int64_t first;
    int64_t count;
};

DDIM_FAST_DECLARE_EACH(void element_row(const Elementwise& op, const ElementRow& row);)

}  // namespace ddim_fast
