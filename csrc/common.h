// What every source of the module knows.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DDIM_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DDIM_FAST_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace ddim_fast {

// On the host, 16-bit numbers are their bits.
struct bfloat16 {
    uint16_t bits;
};

// The codes by which Python names them.
enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2 };

DDIM_FAST_HOST_DEVICE constexpr int size_of(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

}  // namespace ddim_fast
