#include "ddim_step.h"

#include <algorithm>
#include <future>
#include <vector>

// One binary for every x86 processor: the compiler makes a version of the loop for each instruction set and the loader
// picks one. It takes GCC and glibc's ifunc; elsewhere the loop is vectorised for the baseline alone.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define DDIM_FAST_FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DDIM_FAST_FOR_EACH_CPU
#endif

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
    const int64_t parts = std::clamp<int64_t>(arrays.numel / kGrain, 1, num_threads);
    const int64_t lines = (arrays.numel + kLine - 1) / kLine;
    const int64_t chunk = (lines + parts - 1) / parts * kLine;

    // A future waits for its thread when it is destroyed, also when starting a later one throws.
    std::vector<std::future<void>> others;
    for (int64_t begin = chunk; begin < arrays.numel; begin += chunk) {
        const int64_t end = std::min(begin + chunk, arrays.numel);
        others.push_back(std::async(std::launch::async, [&arrays, coefficients, clip, begin, end] {
            step_range(arrays, coefficients, clip, begin, end);
        }));
    }
    step_range(arrays, coefficients, clip, 0, std::min(chunk, arrays.numel));
}

}  // namespace ddim_fast
