// The part of ddim_step that is compiled once for each instruction set.
#pragma once

#include "ddim_step.h"
#include "instruction_set.h"

namespace ddim_fast {

// The elements [begin, end); z is their noise, which starts at element `origin`, or null.
DDIM_FAST_DECLARE_EACH(void step_range(const DdimStep& op, int64_t begin, int64_t end, const void* z, Dtype z_dtype,
                                       int64_t origin);)

}  // namespace ddim_fast
