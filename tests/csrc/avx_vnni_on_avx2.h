// The kernel of conv3x3 that multiplies 8-bit numbers by AVX-VNNI, with that instruction computed by AVX2's: few processors have it.
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>

// sums + the products of four unsigned bytes of a and four signed ones of b, in each lane.
static __m256i dot_products(__m256i sums, __m256i a, __m256i b) {
    const __m256i low = _mm256_set1_epi16(0xFF), ones = _mm256_set1_epi16(1);
    const __m256i even = _mm256_mullo_epi16(_mm256_and_si256(a, low), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(even, ones), _mm256_madd_epi16(odd, ones)));
}

#define _mm256_dpbusd_avx_epi32 dot_products
#define __AVXVNNI__ 1
#define DDIM_FAST_ISA avxvnni
#define DDIM_FAST_X86
#include "conv3x3_kernel.cpp"

// The whole convolution, as one task. weight, units and start: with strips of 16 output channels.
extern "C" void conv3x3_avx_vnni(const float* x, const int8_t* weight, const float* bias, float* out, const int64_t* sizes,
                                 int upsample, const float* steps, const float* units, const int32_t* start) {
    using namespace ddim_fast;
    const Conv3x3<float, int8_t> op = {x,        weight,   bias,     nullptr,  out,          sizes[0],
                                       sizes[1], sizes[2], sizes[3], sizes[4], upsample != 0, 2, {steps, units, start}};
    const int64_t tiles = op.images * tiles_along(op, op.height) * tiles_along(op, op.width);
    const Scratch<float, int8_t> scratch(op, tiles);
    void* const memory = std::aligned_alloc(64, scratch.whole_lines(scratch.bytes));
    avxvnni::run_tiles(op, {0, tiles, 0, (op.out_channels + kBlock - 1) / kBlock}, memory);
    std::free(memory);
}
