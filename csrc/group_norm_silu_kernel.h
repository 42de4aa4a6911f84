// The part of group_norm_silu that is compiled once for each instruction set.
#pragma once

#include "group_norm_silu.h"
#include "instruction_set.h"

namespace ddim_fast {

// How an image's channels are cut into tasks, all but the last of the same size.
struct Cut {
    int64_t channels;  // a task, whole groups
    int64_t tasks_an_image;
    int64_t width;  // numbers in a row of a task's scratch memory
};

// Room in a row of scratch memory for the last, partial vector of any instruction set.
constexpr int64_t kWidestVector = 16;

// The tasks [begin, end). scratch: cut.width doubles and five times as many floats.
DDIM_FAST_DECLARE_EACH(
    void run_tasks(const GroupNormSilu<float>& op, const Cut& cut, int64_t begin, int64_t end, double* scratch);
    void run_tasks(const GroupNormSilu<bfloat16>& op, const Cut& cut, int64_t begin, int64_t end, double* scratch);)

#ifdef DDIM_FAST_X86
namespace avx512bf16 {
void run_tasks(const GroupNormSilu<bfloat16>& op, const Cut& cut, int64_t begin, int64_t end, double* scratch);
}
#endif

}  // namespace ddim_fast
