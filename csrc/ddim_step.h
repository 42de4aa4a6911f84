// One DDIM update, x_t and the network's output -> x_{t'}, in a single pass over memory.
//
//   x0  = p x + q m                 the clean image that sample x and model output m imply
//   x0  = clamp(x0, -clip, clip)    clip = +inf leaves it alone; NaN stays NaN
//   eps = r x + s m                 the noise that they imply
//   out = u x0 + v eps (+ sigma z)  z is optional
//
// Every operation is rounded on its own, in exactly this order, so that plain fp32 tensor operations give the same
// bits. That forbids fused multiply-adds: compile with -ffp-contract=off (host) and -fmad=false (nvcc).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DDIM_FAST_HOST_DEVICE __host__ __device__
#else
#define DDIM_FAST_HOST_DEVICE
#endif

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

// Arrays of numel fp32 values. noise may be null; out may be exactly one of the inputs, but not overlap one in part.
struct DdimArrays {
    const float* sample;
    const float* model_output;
    const float* noise;
    float* out;
    int64_t numel;
};

// The update of one element, without its noise.
DDIM_FAST_HOST_DEVICE inline float ddim_step_element(float x, float m, const DdimCoefficients& c, float clip) {
    float x0 = c.x0_from_sample * x + c.x0_from_output * m;
    // Comparisons with NaN are false, so NaN falls through; fmin and fmax would turn it into a number.
    x0 = x0 < -clip ? -clip : x0;
    x0 = x0 > clip ? clip : x0;
    const float eps = c.eps_from_sample * x + c.eps_from_output * m;
    return c.prev_from_x0 * x0 + c.prev_from_eps * eps;
}

// On the host, with up to num_threads threads.
void ddim_step(const DdimArrays& arrays, const DdimCoefficients& coefficients, float clip, int num_threads);

// On the current CUDA device, queued on stream (a cudaStream_t) without waiting for it. Throws std::runtime_error.
void ddim_step_cuda(const DdimArrays& arrays, const DdimCoefficients& coefficients, float clip, void* stream);

}  // namespace ddim_fast
