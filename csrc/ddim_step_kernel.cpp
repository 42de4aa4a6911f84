// The update of a range of elements. Compiled once for each instruction set: see instruction_set.h.
#include "ddim_step_kernel.h"

#include "vector.h"

namespace ddim_fast::DDIM_FAST_ISA {
namespace {

#include "ddim_step_element.h"

// kFull: a whole vector of elements, and `count` of them otherwise.
template <bool kFull>
DDIM_FAST_INLINE Vector load_elements(const void* base, Dtype dtype, int64_t i, int64_t count) {
    if (dtype == Dtype::bf16) {
        const auto* p = static_cast<const bfloat16*>(base) + i;
        return kFull ? load(p) : load_some(p, count);
    }
    const auto* p = static_cast<const float*>(base) + i;
    return kFull ? load(p) : load_some(p, count);
}

template <bool kFull>
DDIM_FAST_INLINE void store_elements(void* base, Dtype dtype, int64_t i, Vector value, int64_t count) {
    if (dtype == Dtype::bf16) {
        auto* p = static_cast<bfloat16*>(base) + i;
        kFull ? store(p, value) : store_some(p, value, count);
    } else {
        auto* p = static_cast<float*>(base) + i;
        kFull ? store(p, value) : store_some(p, value, count);
    }
}

// The elements i, i + 1, ...; z is their noise, or null.
template <bool kFull>
DDIM_FAST_INLINE void step_elements(const DdimStep& op, int64_t i, const void* z, Dtype z_dtype, int64_t z_at, int64_t count) {
    const Vector x = load_elements<kFull>(op.sample, op.sample_dtype, i, count);
    Vector m = load_elements<kFull>(op.model_output, op.output_dtype, i, count);
    if (op.unconditional) {
        const Vector n = load_elements<kFull>(op.unconditional, op.output_dtype, i, count);
        m = n + op.guidance * (m - n);
    }
    Vector out = ddim_step_element(x, m, op.coefficients, op.clip);
    if (z) out += op.coefficients.sigma * load_elements<kFull>(z, z_dtype, z_at, count);
    store_elements<kFull>(op.out, op.out_dtype, i, out, count);
}

}  // namespace

__attribute__((flatten)) void step_range(const DdimStep& step, int64_t begin, int64_t end, const void* z, Dtype z_dtype,
                                         int64_t origin) {
    const DdimStep op = step;  // a copy, which writing to out cannot change
    for (; begin + kLanes <= end; begin += kLanes) step_elements<true>(op, begin, z, z_dtype, begin - origin, kLanes);
    if (begin < end) step_elements<false>(op, begin, z, z_dtype, begin - origin, end - begin);
}

}  // namespace ddim_fast::DDIM_FAST_ISA
