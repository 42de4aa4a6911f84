// One binary for every processor: setup.py compiles each *_kernel.cpp once for each instruction set, in a namespace named after
// it (DDIM_FAST_ISA), and what is run is chosen here.
//
// A kernel file includes nothing but this project's headers and C's, and what those define has internal linkage: an inline
// function of another header, compiled with AVX-512, could be the copy that the linker keeps for everybody.
#pragma once

namespace ddim_fast {

enum class InstructionSet { baseline, avx2, avx512 };

// The best that this processor has and this module was compiled for. DDIM_FAST_CPU=baseline or avx2, read once, asks for less.
InstructionSet instruction_set();

// Its name in DDIM_FAST_CPU.
const char* instruction_set_name();

// What AVX-512 and AVX2 may come with; false where the instruction set in use is less than they need.
bool has_avx512_bf16();
bool has_avx512_vnni();
bool has_avx_vnni();

// Declares something in the namespace of each instruction set, and chooses one of them, as a value of Type. setup.py defines
// DDIM_FAST_X86 where it compiles for those of x86.
#ifdef DDIM_FAST_X86
#define DDIM_FAST_DECLARE_EACH(...)    \
    namespace baseline { __VA_ARGS__ } \
    namespace avx2 { __VA_ARGS__ }     \
    namespace avx512 { __VA_ARGS__ }
#define DDIM_FAST_CHOOSE(Type, name)                                  \
    (instruction_set() == InstructionSet::avx512 ? Type(avx512::name) \
     : instruction_set() == InstructionSet::avx2 ? Type(avx2::name)   \
                                                 : Type(baseline::name))
#else
#define DDIM_FAST_DECLARE_EACH(...) \
    namespace baseline { __VA_ARGS__ }
#define DDIM_FAST_CHOOSE(Type, name) (Type(baseline::name))
#endif

}  // namespace ddim_fast
