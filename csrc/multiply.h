// The products of a group of rows and a strip of columns: what convolutions and matrix products have in common. For kernel
// files: see instruction_set.h.
#pragma once

#include "tile.h"
#include "vector.h"

namespace ddim_fast::DDIM_FAST_ISA {
namespace {

// Vectors of columns whose sums, for a group of rows, fill the processor's registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

// The left side of a product: its number (row, k) is at[row * row_stride + k * k_stride].
template <typename A>
struct Left {
    const A* at;
    int64_t row_stride;
    int64_t k_stride;
};

// What else the product of a group of rows and a strip of weights is given.
template <typename W>
struct Aside {};

// The weights of the next strip that are fetched meanwhile, a part of each of its rows, and the bytes of that: the caches guess
// too late what is needed next. With AVX-512, whose strips are four times as wide, they guess well, and fetching costs more.
template <>
struct Aside<float> {
    const char* next = nullptr;
    int64_t bytes = 0;
};
constexpr bool kFetches = kLanes < 16;

// What a sum of 8-bit products is worth, and where it starts.
template <>
struct Aside<int8_t> {
    const float* units;
    const int32_t* start;
};

// Products that are added one after the other. Their rounding errors grow with the length of the chain, so a longer sum is one
// of several chains.
constexpr int64_t kChain = 64;

// Into the second-level cache.
DDIM_FAST_INLINE void fetch(const char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// out[row] = sum over k of a[row][k] * b[k], for a group of rows and N vectors of columns. Rows of b lie `b_stride` apart,
// those of out kBlock. A: fp32, or bf16 that is multiplied as fp32.
template <int N, typename A>
DDIM_FAST_INLINE void multiply(Left<A> a, int64_t depth, const float* b, int64_t b_stride, float* out, Aside<float> aside) {
    for (int64_t begin = 0; begin < depth; begin += kChain) {
        if (kFetches) fetch(aside.next + begin * aside.bytes, smaller(kChain, depth - begin) * aside.bytes);
        Vector sums[kTileGroup][N] = {};
        for (int64_t k = begin; k < smaller(begin + kChain, depth); ++k) {
            Vector right[N];
            DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) right[n] = load(b + k * b_stride + n * kLanes);
            DDIM_FAST_UNROLL for (int row = 0; row < kTileGroup; ++row) {
                const Vector left = broadcast(to_float(a.at[row * a.row_stride + k * a.k_stride]));
                DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) sums[row][n] += left * right[n];
            }
        }
        DDIM_FAST_UNROLL for (int row = 0; row < kTileGroup; ++row)
            DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) {
                float* const result = out + row * kBlock + n * kLanes;
                store(result, begin == 0 ? sums[row][n] : load(result) + sums[row][n]);
            }
    }
}

DDIM_FAST_INLINE void store_component(float* p, Vector v, float) { store(p, v); }

#ifdef __AVX512BF16__

DDIM_FAST_INLINE void store_component(bfloat16* p, Vector v, float) { store(p, v); }

// The same on pairs of numbers along the depth, which lie beside each other in a and in b.
template <int N>
DDIM_FAST_INLINE void multiply(Left<bfloat16> a, int64_t depth, const bfloat16* b, int64_t b_stride, float* out,
                               Aside<bfloat16>) {
    __m512 sums[kTileGroup][N];
    DDIM_FAST_UNROLL for (int row = 0; row < kTileGroup; ++row)
        DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) sums[row][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 2) {
        __m512bh right[N];
        DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) right[n] = (__m512bh)_mm512_loadu_si512(b + k * b_stride + 2 * n * kLanes);
        DDIM_FAST_UNROLL for (int row = 0; row < kTileGroup; ++row) {
            int pair;
            memcpy(&pair, a.at + row * a.row_stride + k, sizeof pair);
            const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
            DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) sums[row][n] = _mm512_dpbf16_ps(sums[row][n], left, right[n]);
        }
    }
    DDIM_FAST_UNROLL for (int row = 0; row < kTileGroup; ++row)
        DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) _mm512_storeu_ps(out + row * kBlock + n * kLanes, sums[row][n]);
}

#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// To 0..255, as the products want their left side: rounded to nearest even, shifted by 128. NaN becomes the least number.
DDIM_FAST_INLINE void store_component(int8_t* p, Vector v, float steps) {
#ifdef __AVX512VNNI__
    const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32((__m512)(v * steps)));
#else
    const __m256i whole = _mm256_cvtps_epi32((__m256)(v * steps));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    const __m128i bytes = _mm_packs_epi16(words, words);
#endif
    const __m128i shifted = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
    memcpy(p, &shifted, kLanes);
}

// sums + the products of four numbers from 0 to 255 and four from -128 to 127, in each lane.
DDIM_FAST_INLINE LaneVector add_products(LaneVector sums, LaneVector left, LaneVector right) {
#ifdef __AVX512VNNI__
    return (LaneVector)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)left, (__m512i)right);
#else
    return (LaneVector)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)left, (__m256i)right);
#endif
}

DDIM_FAST_INLINE LaneVector load_lanes(const void* p) {
    LaneVector v;
    memcpy(&v, p, sizeof v);
    return v;
}

// The same on four numbers along the depth, which lie beside each other in a and in b.
template <int N>
DDIM_FAST_INLINE void multiply(Left<int8_t> a, int64_t depth, const int8_t* b, int64_t b_stride, float* out,
                               Aside<int8_t> column) {
    LaneVector sums[kTileGroup][N] = {};
    for (int64_t k = 0; k < depth; k += 4) {
        LaneVector right[N];
        DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) right[n] = load_lanes(b + k * b_stride + 4 * n * kLanes);
        DDIM_FAST_UNROLL for (int row = 0; row < kTileGroup; ++row) {
            int32_t four;
            memcpy(&four, a.at + row * a.row_stride + k, sizeof four);
            const LaneVector left = four - LaneVector{};
            DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) sums[row][n] = add_products(sums[row][n], left, right[n]);
        }
    }
    DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) {
        const Vector unit = load(column.units + n * kLanes);
        const LaneVector start = load_lanes(column.start + n * kLanes);
        DDIM_FAST_UNROLL for (int row = 0; row < kTileGroup; ++row)
            store(out + row * kBlock + n * kLanes, __builtin_convertvector(sums[row][n] + start, Vector) * unit);
    }
}

#endif

// multiply for up to N vectors of columns, `width` numbers.
template <int N, typename A, typename W>
DDIM_FAST_INLINE void multiply_up_to(Left<A> a, int64_t depth, const W* b, int64_t b_stride, int64_t width, float* out,
                                     Aside<W> aside) {
    if (width >= N * kLanes)
        multiply<N>(a, depth, b, b_stride, out, aside);
    else if constexpr (N > 1)
        multiply_up_to<N - 1>(a, depth, b, b_stride, width, out, aside);
}

}  // namespace
}  // namespace ddim_fast::DDIM_FAST_ISA
