// One binary for every processor: compiles DDIM_FAST_KERNEL, a file of functions on the vectors of vector.h, once for each
// instruction set, in the namespaces ddim_fast::baseline, ::avx2 and ::avx512; DDIM_FAST_VECTOR_BITS says how wide its vectors
// are.
//
// GCC's target_clones would not do: vectors are taken apart for the baseline before the clones are made. For the same reason
// the kernel calls no vector function but its own. What it includes is included before, so that no function of another
// header is compiled for a processor that may not be there.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common.h"

#define DDIM_FAST_INLINE inline __attribute__((always_inline))

namespace ddim_fast::baseline {
#define DDIM_FAST_VECTOR_BITS 128
#include "vector.h"
#include DDIM_FAST_KERNEL
#undef DDIM_FAST_VECTOR_BITS
}  // namespace ddim_fast::baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace ddim_fast::avx2 {
#define DDIM_FAST_VECTOR_BITS 256
#include "vector.h"
#include DDIM_FAST_KERNEL
#undef DDIM_FAST_VECTOR_BITS
}  // namespace ddim_fast::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace ddim_fast::avx512 {
#define DDIM_FAST_VECTOR_BITS 512
#include "vector.h"
#include DDIM_FAST_KERNEL
#undef DDIM_FAST_VECTOR_BITS
}  // namespace ddim_fast::avx512
#pragma GCC pop_options

namespace ddim_fast {

// The best that the processor has. DDIM_FAST_CPU=baseline or avx2 asks for less, so that tests reach all of them.
template <typename Function>
Function* for_this_cpu(Function* baseline, Function* avx2, Function* avx512) {
    const char* asked = std::getenv("DDIM_FAST_CPU");
    const auto allowed = [asked](const char* less) { return asked == nullptr || std::strcmp(asked, less) != 0; };
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && allowed("baseline");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl") && allowed("avx2");
    return has_avx512 ? avx512 : has_avx2 ? avx2 : baseline;
}

}  // namespace ddim_fast

#define DDIM_FAST_FOR_THIS_CPU(...) \
    ddim_fast::for_this_cpu(ddim_fast::baseline::__VA_ARGS__, ddim_fast::avx2::__VA_ARGS__, ddim_fast::avx512::__VA_ARGS__)
#else
#define DDIM_FAST_FOR_THIS_CPU(...) (&ddim_fast::baseline::__VA_ARGS__)
#endif
