// A row of elements. Compiled once for each instruction set: see instruction_set.h.
#include "elementwise_kernel.h"

#include "vector.h"

namespace ddim_fast::DDIM_FAST_ISA {
namespace {

template <typename T>
DDIM_FAST_INLINE Vector load_strided(const T* p, int64_t stride, int64_t count) {
    if (stride == 0) return broadcast(to_float(*p));
    if (stride == 1) return count == kLanes ? load(p) : load_some(p, count);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = to_float(p[i * stride]);
    return load(lanes);
}

template <typename T>
DDIM_FAST_INLINE void store_strided(T* p, Vector v, int64_t stride, int64_t count) {
    if (stride == 1) return count == kLanes ? store(p, v) : store_some(p, v, count);
    T lanes[kLanes];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) p[i * stride] = lanes[i];
}

DDIM_FAST_INLINE Vector load_operand(const Operand& x, int64_t offset, int64_t i, int64_t count) {
    const int64_t stride = x.strides[kDimensions - 1], at = offset + i * stride;
    return x.dtype == Dtype::bf16 ? load_strided(static_cast<const bfloat16*>(x.data) + at, stride, count)
                                  : load_strided(static_cast<const float*>(x.data) + at, stride, count);
}

template <Arithmetic kArithmetic>
DDIM_FAST_INLINE void run(const Elementwise& op, const ElementRow& row) {
    for (int64_t i = row.first; i < row.first + row.count; i += kLanes) {
        const int64_t count = smaller(kLanes, row.first + row.count - i);
        const auto input = [&](int n) __attribute__((always_inline)) {
            return load_operand(op.inputs[n], row.inputs[n], i, count);
        };
        Vector v = {};
        if constexpr (kArithmetic == Arithmetic::fill) v = broadcast(op.number);
        if constexpr (kArithmetic == Arithmetic::copy) v = input(0);
        if constexpr (kArithmetic == Arithmetic::add) v = input(0) + op.number * input(1);
        if constexpr (kArithmetic == Arithmetic::multiply) v = input(0) * input(1);
        if constexpr (kArithmetic == Arithmetic::divide) v = input(0) / input(1);
        if constexpr (kArithmetic == Arithmetic::clamp) v = at_most(op.most, at_least(op.number, input(0)));
        if constexpr (kArithmetic == Arithmetic::addcmul) v = input(0) + op.number * (input(1) * input(2));
        if constexpr (kArithmetic == Arithmetic::lerp) {
            const Vector a = input(0), b = input(1), weight = input(2);
            const LaneVector near_a = (weight < 0.5f) & (weight > -0.5f);
            v = near_a ? a + weight * (b - a) : b - (b - a) * (1.0f - weight);
        }
        const int64_t stride = op.out.strides[kDimensions - 1], at = row.out + i * stride;
        if (op.out.dtype == Dtype::bf16)
            store_strided(static_cast<bfloat16*>(op.out.data) + at, v, stride, count);
        else
            store_strided(static_cast<float*>(op.out.data) + at, v, stride, count);
    }
}

}  // namespace

__attribute__((flatten)) void element_row(const Elementwise& op, const ElementRow& row) {
    switch (op.arithmetic) {
        case Arithmetic::fill: return run<Arithmetic::fill>(op, row);
        case Arithmetic::copy: return run<Arithmetic::copy>(op, row);
        case Arithmetic::add: return run<Arithmetic::add>(op, row);
        case Arithmetic::multiply: return run<Arithmetic::multiply>(op, row);
        case Arithmetic::divide: return run<Arithmetic::divide>(op, row);
        case Arithmetic::clamp: return run<Arithmetic::clamp>(op, row);
        case Arithmetic::lerp: return run<Arithmetic::lerp>(op, row);
        case Arithmetic::addcmul: return run<Arithmetic::addcmul>(op, row);
    }
}

}  // namespace ddim_fast::DDIM_FAST_ISA
