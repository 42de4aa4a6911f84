// As many floats at a time as a register holds, with GCC's and Clang's vector extension. For kernel files, which are compiled
// once for each instruction set: see instruction_set.h. GCC keeps vectors wider than a register in memory, 50 times slower.
#pragma once

#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "common.h"

#define DDIM_FAST_INLINE inline __attribute__((always_inline))

#ifdef __clang__
#define DDIM_FAST_UNROLL _Pragma("clang loop unroll(full)")
#else
#define DDIM_FAST_UNROLL _Pragma("GCC unroll 16")
#endif

namespace ddim_fast::DDIM_FAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitsVector __attribute__((vector_size(4 * kLanes)));
typedef int32_t LaneVector __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfBitsVector __attribute__((vector_size(2 * kLanes)));
typedef float HalfVector __attribute__((vector_size(2 * kLanes)));
typedef double DoubleVector __attribute__((vector_size(4 * kLanes)));

// As many doubles as a vector has floats.
struct WideVector {
    DoubleVector half[2];
};

DDIM_FAST_INLINE Vector broadcast(float value) { return value - Vector{}; }

DDIM_FAST_INLINE float to_float(float value) { return value; }

DDIM_FAST_INLINE float to_float(bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

DDIM_FAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

DDIM_FAST_INLINE void add(WideVector& sum, Vector v) {
    HalfVector halves[2];
    memcpy(halves, &v, sizeof v);
    for (int i = 0; i < 2; ++i) sum.half[i] += __builtin_convertvector(halves[i], DoubleVector);
}

DDIM_FAST_INLINE void store(double* p, WideVector v) { memcpy(p, &v, sizeof v); }

DDIM_FAST_INLINE double add_lanes(WideVector v) {
    const DoubleVector sums = v.half[0] + v.half[1];
    double total = 0;
    for (int64_t i = 0; i < kLanes / 2; ++i) total += sums[i];
    return total;
}

DDIM_FAST_INLINE Vector load(const float* p) {
    Vector v;
    memcpy(&v, p, sizeof v);
    return v;
}

DDIM_FAST_INLINE Vector load(const bfloat16* p) {
    HalfBitsVector bits;
    memcpy(&bits, p, sizeof bits);
    return (Vector)(__builtin_convertvector(bits, BitsVector) << 16);
}

DDIM_FAST_INLINE void store(float* p, Vector v) { memcpy(p, &v, sizeof v); }

// Rounds to nearest even; NaN stays NaN. Numbers below 2^-126 become zero where AVX-512 BF16 does it.
DDIM_FAST_INLINE void store(bfloat16* p, Vector v) {
#ifdef __AVX512BF16__
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
    const BitsVector bits = (BitsVector)v;
    const BitsVector rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    const BitsVector word = (bits & 0x7FFFFFFF) > 0x7F800000 ? bits | 0x400000 : rounded;
    const HalfBitsVector half = __builtin_convertvector(word >> 16, HalfBitsVector);
#endif
    memcpy(p, &half, sizeof half);
}

// The first `count` of them, the rest zero.
template <typename T>
DDIM_FAST_INLINE Vector load_some(const T* p, int64_t count) {
    T padded[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
    return load(padded);
}

template <typename T>
DDIM_FAST_INLINE void store_some(T* p, Vector v, int64_t count) {
    T padded[kLanes];
    store(padded, v);
    for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

// v in the first `count` lanes, zero in the others.
DDIM_FAST_INLINE Vector first_lanes(Vector v, int64_t count) {
    for (int64_t i = count; i < kLanes; ++i) v[i] = 0;
    return v;
}

// The smaller and the larger of a number and those of a vector, where NaN stays NaN. What GCC makes of `v > most ? most : v`
// takes two instructions.
DDIM_FAST_INLINE Vector at_most(float most, Vector v) {
#if defined(__AVX512F__)
    return (Vector)_mm512_min_ps((__m512)broadcast(most), (__m512)v);
#elif defined(__AVX2__)
    return (Vector)_mm256_min_ps((__m256)broadcast(most), (__m256)v);
#else
    return v > most ? broadcast(most) : v;
#endif
}

DDIM_FAST_INLINE Vector at_least(float least, Vector v) {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)broadcast(least), (__m512)v);
#elif defined(__AVX2__)
    return (Vector)_mm256_max_ps((__m256)broadcast(least), (__m256)v);
#else
    return v < least ? broadcast(least) : v;
#endif
}

// e^(factor x / log2(e)) to 2 ulp, x * factor being at most 127 in magnitude: 2^n 2^f, n a whole number and 2^f a polynomial on
// [-1/2, 1/2].
DDIM_FAST_INLINE Vector power_of_two(Vector x, float factor) {
#ifdef __AVX512F__
    const Vector n = (Vector)_mm512_roundscale_ps((__m512)(x * factor), 0);
#else
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const Vector shifted = x * factor + magic;
    const Vector n = shifted - magic;
#endif
    const Vector f = x * factor - n;
    Vector p = f * 0.00132647273f + 0.00967151299f;
    p = p * f + 0.0555073359f;
    p = p * f + 0.240222424f;
    p = p * f + 0.693147004f;
    p = p * f + 1.0f;
#ifdef __AVX512F__
    return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // The integer becomes the exponent of 2^n; the magic number's own bits are shifted out.
    return p * (Vector)(((BitsVector)shifted << 23) + 0x3F800000u);
#endif
}

constexpr float kLog2E = 1.44269504088896341f;

// e^x for x up to 0; below -87, where results are smaller than any normal number, about zero. NaN stays NaN.
DDIM_FAST_INLINE Vector exponential(Vector x) { return power_of_two(at_least(-87.0f, x), kLog2E); }

// y / (1 + e^-y). NaN stays NaN.
DDIM_FAST_INLINE Vector silu(Vector y) {
#ifdef __AVX512F__
    const Vector x = at_most(88.0f, y);
#else
    const Vector x = at_least(-87.0f, at_most(87.0f, y));
#endif
    return y / (power_of_two(x, -kLog2E) + 1.0f);
}

}  // namespace
}  // namespace ddim_fast::DDIM_FAST_ISA
