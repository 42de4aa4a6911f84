// What the CUDA sources share: accesses of up to 16 bytes, 16-bit numbers, warps and launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace ddim_fast {

// What moves kBytes in the fewest accesses.
template <int kBytes>
using Unit = std::conditional_t<
    kBytes % 16 == 0, uint4,
    std::conditional_t<kBytes % 8 == 0, uint2, std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>>>;

// Both sides are aligned to the unit.
template <int kBytes>
__device__ __forceinline__ void copy(void* to, const void* from) {
    using U = Unit<kBytes>;
#pragma unroll
    for (int i = 0; i < kBytes / int(sizeof(U)); ++i) static_cast<U*>(to)[i] = static_cast<const U*>(from)[i];
}

// The same to global memory, by an instruction that the compiler cannot take apart.
template <int kBytes>
__device__ __forceinline__ void write_global(void* to, const void* from) {
    using U = Unit<kBytes>;
#pragma unroll
    for (int i = 0; i < kBytes / int(sizeof(U)); ++i) __stwb(static_cast<U*>(to) + i, static_cast<const U*>(from)[i]);
}

// The same to shared memory, without waiting for it where the bytes are many enough: see __pipeline_commit.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    if constexpr (kBytes >= 4)
        __pipeline_memcpy_async(shared, global, kBytes);
    else
        copy<kBytes>(shared, global);
}

// kWidth values that move together.
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
    T value[kWidth];
};

__device__ __forceinline__ void* dynamic_shared() {
    extern __shared__ uint4 shared_memory[];
    return shared_memory;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// To the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        return __float2bfloat16_rn(value);
    else if constexpr (std::is_same_v<T, __half>)
        return __float2half_rn(value);
    else
        return value;
}

// The sum over a warp, the same bits in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, distance);
    return value;
}

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline void check(cudaError_t error, const char* where) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(where) + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
    int device, value;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
}

// Queues kernel<<<blocks, threads, shared bytes, stream>>>(arguments...).
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, void* stream,
            const Arguments&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace ddim_fast
