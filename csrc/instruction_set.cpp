#include "instruction_set.h"

#include <cstdlib>
#include <cstring>

namespace ddim_fast {
namespace {

InstructionSet choose() {
#ifdef DDIM_FAST_X86
    const char* asked = std::getenv("DDIM_FAST_CPU");
    const auto is_asked = [asked](const char* less) { return asked != nullptr && std::strcmp(asked, less) == 0; };
    if (is_asked("baseline") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return InstructionSet::baseline;
    if (!is_asked("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return InstructionSet::avx512;
    return InstructionSet::avx2;
#else
    return InstructionSet::baseline;
#endif
}

}  // namespace

InstructionSet instruction_set() {
    static const InstructionSet chosen = choose();
    return chosen;
}

const char* instruction_set_name() {
    static constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
    return kNames[static_cast<int>(instruction_set())];
}

#ifdef DDIM_FAST_X86
bool has_avx512_bf16() { return instruction_set() == InstructionSet::avx512 && __builtin_cpu_supports("avx512bf16"); }

bool has_avx512_vnni() { return instruction_set() == InstructionSet::avx512 && __builtin_cpu_supports("avx512vnni"); }

bool has_avx_vnni() {
    if (instruction_set() == InstructionSet::baseline) return false;
    // __builtin_cpu_supports knows "avxvnni" from GCC 13 on: leaf 7, subleaf 1, bit 4 of EAX.
    unsigned eax = 7, ebx = 0, ecx = 1, edx = 0;
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return (eax >> 4 & 1) != 0;
}
#else
bool has_avx512_bf16() { return false; }
bool has_avx512_vnni() { return false; }
bool has_avx_vnni() { return false; }
#endif

}  // namespace ddim_fast
