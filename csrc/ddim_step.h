// One DDIM update, x_t and the network's output -> x_{t'}, in a single pass over memory.
//
//   m   = n + guidance (m - n)      only with an unconditional output n
//   x0  = p x + q m                 the clean image that sample x and model output m imply
//   x0  = clamp(x0, -clip, clip)    clip = +inf leaves it alone; NaN stays NaN
//   eps = r x + s m                 the noise that they imply
//   out = u x0 + v eps (+ sigma z)  z: an array, or drawn here from the images' seeds (philox.h)
//
// All in fp32, and rounded once more to the dtype of out. Every operation is rounded on its own, in exactly this order,
// so that plain fp32 tensor operations give the same bits. That forbids fused multiply-adds: compile with
// -ffp-contract=off (host) and -fmad=false (nvcc).
#pragma once

#include <cstdint>

#include "common.h"

namespace ddim_fast {

struct DdimCoefficients {
    float x0_from_sample;   // p
    float x0_from_output;   // q
    float eps_from_sample;  // r
    float eps_from_output;  // s
    float prev_from_x0;     // u
    float prev_from_eps;    // v
    float sigma;
};

// Arrays of numel values. out may be exactly one of the inputs if their dtypes have one size, but not overlap one in part.
struct DdimStep {
    const void* sample;
    const void* model_output;
    const void* unconditional;  // or null
    const void* noise;          // or null
    const int64_t* seeds;       // one an image, or null; only without noise
    void* out;
    int64_t numel;
    int64_t image_numel;  // a divisor of numel, at most 2^34; only with seeds
    Dtype sample_dtype;   // of sample and noise
    Dtype output_dtype;   // of model_output and unconditional
    Dtype out_dtype;
    DdimCoefficients coefficients;
    float clip;
    float guidance;
    uint32_t step;  // under which the noise of the seeds is drawn
};

// On the device: row `*index` of `rows` takes the place of the coefficients, and `*index` that of the step.
struct DdimTable {
    const DdimCoefficients* row;  // null: there is no table
    int64_t rows;
    const int64_t* index;
};

// On the host, fp32 and bf16, with up to num_threads threads.
void ddim_step(const DdimStep& op, int num_threads);

// On the current CUDA device, queued on stream (a cudaStream_t) without waiting for it. An index outside the table fills
// out with NaN. Throws std::runtime_error.
void ddim_step_cuda(const DdimStep& op, const DdimTable& table, void* stream);

}  // namespace ddim_fast
