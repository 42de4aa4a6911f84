#include "elementwise.h"

#include <algorithm>

#include "elementwise_kernel.h"
#include "parallel.h"

namespace ddim_fast {
namespace {

// Elements of a row that are taken together, and elements that are worth a thread of their own.
constexpr int64_t kPart = 1 << 10, kGrain = 1 << 14;

}  // namespace

void elementwise(const Elementwise& op, int num_threads) {
    using Run = void (*)(const Elementwise&, const ElementRow&);
    const Run run = DDIM_FAST_CHOOSE(Run, element_row);
    const auto [d0, d1, d2, length] = op.sizes;
    const int64_t rows = d0 * d1 * d2, parts = (length + kPart - 1) / kPart;
    if (rows * length == 0) return;
    const int64_t threads = std::clamp<int64_t>(rows * length / kGrain, 1, num_threads);
    parallel_for(rows * parts, 1, threads, [&, d1 = d1, d2 = d2, length = length](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / parts, first = i % parts * kPart;
            const int64_t place[3] = {row / d2 / d1, row / d2 % d1, row % d2};
            const auto offset = [&place](const Operand& x) {
                return place[0] * x.strides[0] + place[1] * x.strides[1] + place[2] * x.strides[2];
            };
            const auto& in = op.inputs;
            run(op, {{offset(in[0]), offset(in[1]), offset(in[2])}, offset(op.out), first, std::min(kPart, length - first)});
        }
    });
}

}  // namespace ddim_fast
