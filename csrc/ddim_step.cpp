#include "ddim_step.h"

#include "parallel.h"

namespace ddim_fast {
namespace {

// Elements that are worth a thread of their own: below two grains, starting a second one costs more than it saves.
constexpr int64_t kGrain = 1 << 19;

// Whole cache lines to each thread, so that no two write to the same one.
constexpr int64_t kLine = 64 / sizeof(float);

// `omp simd` promises that iterations are independent, which holds when out is one of the inputs. Without the promise
// the compiler tests for overlap and would run an in-place step one element at a time.
DDIM_FAST_FOR_EACH_CPU
void step_range(const DdimArrays& arrays, DdimCoefficients c, float clip, int64_t begin, int64_t end) {
    const float* x = arrays.sample;
    const float* m = arrays.model_output;
    const float* z = arrays.noise;
    float* out = arrays.out;
    if (z == nullptr) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) out[i] = ddim_step_element(x[i], m[i], c, clip);
    } else {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) out[i] = ddim_step_element(x[i], m[i], c, clip) + c.sigma * z[i];
    }
}

}  // namespace

void ddim_step(const DdimArrays& arrays, const DdimCoefficients& coefficients, float clip, int num_threads) {
    const int64_t threads = std::clamp<int64_t>(arrays.numel / kGrain, 1, num_threads);
    parallel_for(arrays.numel, kLine, threads, [&](int64_t begin, int64_t end) {
        step_range(arrays, coefficients, clip, begin, end);
    });
}

}  // namespace ddim_fast
