// Just enough of CUDA to run the kernels of csrc/ on a machine without a GPU, compiled as C++ with this file included first.
//
// Blocks run one after another, and each thread of a block is a fiber that runs until it has to wait for others. What a GPU
// would do badly or not at all is an error here: threads that wait at different barriers, unaligned asynchronous copies,
// more shared memory than was asked for. Shared memory starts as NaN, and asynchronous copies arrive as late as they may.
// Warps and blocks run forwards or backwards: a missing barrier makes a difference between the two.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

using std::min;

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t kMostShared = 227 << 10, kGuard = 4096;
namespace ddim_fast {
inline uint4 shared_memory[(kMostShared + kGuard) / sizeof(uint4)];
}

namespace cuda_on_cpu {

inline int multiprocessors = 132, shared_limit = kMostShared;
inline bool backwards = false;

enum class State { ready, at_warp_barrier, at_block_barrier, finished };

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    int line;        // of the barrier
    double lane[2];  // what the thread shows to its warp, in turns
    bool turn;
    std::vector<Copy> copies;
};

inline std::vector<Fiber> fibers;
inline Fiber* current;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline std::exception_ptr failure;

constexpr size_t kStack = 128 << 10;

inline void wait(State state, int line) {
    current->state = state;
    current->line = line;
    swapcontext(&current->context, &scheduler);
}

template <typename Number>
Number shuffle_xor(Number value, int distance, int line) {
    Fiber* const self = current;
    const bool turn = self->turn = !self->turn;
    self->lane[turn] = value;
    wait(State::at_warp_barrier, line);
    return static_cast<Number>(fibers[(self - fibers.data()) ^ distance].lane[turn]);
}

inline void copy_later(void* to, const void* from, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
        throw std::runtime_error("an asynchronous copy is not aligned");
    current->copies.push_back({to, from, bytes});
}

inline void copy_now() {
    for (const Copy& copy : current->copies) std::memcpy(copy.to, copy.from, copy.bytes);
    current->copies.clear();
}

inline void run_fiber() {
    try {
        kernel();
    } catch (...) {
        failure = std::current_exception();
    }
    current->state = State::finished;
    swapcontext(&current->context, &scheduler);
}

inline void start_fiber(Fiber& fiber) {
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.state = State::ready;
    fiber.turn = false;
    fiber.copies.clear();
}

template <typename Visit>
void for_each(int count, const Visit& visit) {
    for (int i = 0; i < count; ++i) visit(backwards ? count - 1 - i : i);
}

// Lets fibers [begin, end) go on if all of them wait at the same barrier.
inline void pass_barrier(int begin, int end) {
    for (int i = begin; i < end; ++i) {
        if (fibers[i].state != fibers[begin].state || fibers[i].line != fibers[begin].line)
            throw std::runtime_error("threads wait at different barriers: lines " + std::to_string(fibers[begin].line) +
                                     " and " + std::to_string(fibers[i].line));
    }
    for (int i = begin; i < end; ++i) fibers[i].state = State::ready;
}

inline void run_warp(int begin, int end) {
    for (;;) {
        for_each(end - begin, [&](int i) {
            if (fibers[begin + i].state != State::ready) return;
            current = &fibers[begin + i];
            threadIdx.x = begin + i;
            swapcontext(&scheduler, &current->context);
            if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
        });
        const auto at_warp_barrier = [](const Fiber& f) { return f.state == State::at_warp_barrier; };
        if (std::none_of(&fibers[begin], &fibers[begin] + (end - begin), at_warp_barrier)) return;
        pass_barrier(begin, end);
    }
}

inline void run_block(int threads, size_t shared) {
    char* memory = reinterpret_cast<char*>(ddim_fast::shared_memory);
    std::memset(memory, 0xFF, shared + kGuard);
    for (int i = 0; i < threads; ++i) start_fiber(fibers[i]);
    for (;;) {
        for_each((threads + 31) / 32, [&](int warp) { run_warp(32 * warp, std::min(32 * warp + 32, threads)); });
        const auto finished = [](const Fiber& f) { return f.state == State::finished; };
        if (std::all_of(&fibers[0], &fibers[0] + threads, finished)) break;
        pass_barrier(0, threads);
    }
    if (std::any_of(memory + shared, memory + shared + kGuard, [](char byte) { return byte != char(0xFF); }))
        throw std::runtime_error("a block wrote past its shared memory");
}

}  // namespace cuda_on_cpu

// The host's side.
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline std::map<const void*, size_t> shared_of_kernel;

inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid launch" : "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::multiprocessors : cuda_on_cpu::shared_limit;
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    if (bytes > cuda_on_cpu::shared_limit) return cudaErrorInvalidValue;
    shared_of_kernel[reinterpret_cast<const void*>(kernel)] = bytes;
    return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
    const size_t allowed = std::max<size_t>(48 << 10, shared_of_kernel[reinterpret_cast<const void*>(kernel)]);
    const unsigned threads = config->blockDim.x, blocks = config->gridDim.x;
    if (threads < 1 || threads > 1024 || blocks < 1 || config->dynamicSmemBytes > allowed) return cudaErrorInvalidConfiguration;
    gridDim = config->gridDim, blockDim = config->blockDim;
    if (cuda_on_cpu::fibers.size() < threads) cuda_on_cpu::fibers.resize(threads);
    cuda_on_cpu::kernel = [&] { kernel(arguments...); };
    cuda_on_cpu::for_each(blocks, [&](int block) {
        blockIdx.x = block;
        cuda_on_cpu::run_block(threads, config->dynamicSmemBytes);
    });
    return cudaSuccess;
}

// The device's side.
#define __syncthreads() cuda_on_cpu::wait(cuda_on_cpu::State::at_block_barrier, __LINE__)
#define __shfl_xor_sync(mask, value, distance) cuda_on_cpu::shuffle_xor(value, distance, __LINE__)
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) { cuda_on_cpu::copy_later(to, from, bytes); }
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) { cuda_on_cpu::copy_now(); }

template <typename Unit>
void __stwb(Unit* to, Unit value) {
    if (reinterpret_cast<uintptr_t>(to) % sizeof value) throw std::runtime_error("a write is not aligned");
    *to = value;
}

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __expf(float x) { return exp2f(x * 1.44269504f); }
inline float __fdividef(float x, float y) { return y > 0x1p126f ? 0 : x / y; }

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return {value == value ? uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) : uint16_t(0x7FFF)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

using __half = _Float16;
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return static_cast<_Float16>(value); }
inline uint16_t __half_as_ushort(__half value) {
    uint16_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline __half __ushort_as_half(uint16_t bits) {
    __half value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// For the tests, through ctypes.
extern "C" __attribute__((used, visibility("default"))) inline void cuda_on_cpu_set(int multiprocessors, int shared_limit,
                                                                                   bool backwards) {
    cuda_on_cpu::multiprocessors = multiprocessors;
    cuda_on_cpu::shared_limit = shared_limit;
    cuda_on_cpu::backwards = backwards;
}
