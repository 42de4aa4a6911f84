// Gaussian noise that belongs to a seed, number for number what ddim_fast/ops/noise.py draws: Philox4x32-10
// (Salmon et al. 2011) and the Box-Muller transform.
//
// The key is the seed, the counter (block, step, 0, 0). Block b gives elements 4b..4b+3 of an image, in the order of a
// contiguous (C, H, W).
#pragma once

#include <cmath>
#include <cstdint>

#include "common.h"

namespace ddim_fast {

struct PhiloxWords {
    uint32_t word[4];
};

DDIM_FAST_HOST_DEVICE PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
    uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53) * c0, p1 = uint64_t(0xCD9E8D57) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ key0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
        c3 = uint32_t(p0);
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
}

DDIM_FAST_HOST_DEVICE PhiloxWords noise_words(int64_t seed, uint32_t step, uint32_t block) {
    return philox4x32({{block, step, 0, 0}}, uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
}

struct Normals {
    float value[4];
};

// The four numbers of a block in fp64, rounded once: the definition.
inline Normals exact_normals(const PhiloxWords& words) {
    Normals normals;
    for (int i = 0; i < 4; i += 2) {
        const double u = (words.word[i] + 0.5) * 0x1p-32, angle = 6.283185307179586 * ((words.word[i + 1] + 0.5) * 0x1p-32);
        const double radius = std::sqrt(-2.0 * std::log(u));
        normals.value[i] = static_cast<float>(radius * std::cos(angle));
        normals.value[i + 1] = static_cast<float>(radius * std::sin(angle));
    }
    return normals;
}

// sqrt(-2 log u) for u = (word + 1/2) / 2^32. Near 1, where u itself has no room for the digits that count, it is
// 1 - u that is rounded to fp32; twice word + 1/2 is an integer, so both are rounded once.
DDIM_FAST_HOST_DEVICE float box_muller_radius(uint32_t word) {
    const bool upper = word >> 31;
    const float distance = float(2 * (upper ? ~word : word) + 1) * 0x1p-33f;  // u or 1 - u, at most 1/2
    return sqrtf(-2.0f * (upper ? log1pf(-distance) : logf(distance)));
}

// The cosine and sine of 2 pi (word + 1/2) / 2^32. The quadrant is split off while the angle is an integer; what remains
// is pi x with |x| <= 1/4, for polynomials with errors of 5e-11 and 4e-9 before rounding.
DDIM_FAST_HOST_DEVICE void box_muller_direction(uint32_t word, float& cosine, float& sine) {
    const uint32_t quadrant = (word + 0x20000000u) >> 30;
    const float x = float(int32_t(2 * (word - (quadrant << 30)) + 1)) * 0x1p-32f;
    const float z = x * x;
    float p = fmaf(z, -0.58947968f, 2.5498106f);
    p = fmaf(z, p, -5.1677094f);
    p = fmaf(z, p, -8.7422780e-8f);
    const float s = fmaf(x, 3.1415927f, x * p);  // pi is the sum of these two constants
    float q = fmaf(z, 0.23142955f, -1.3350585f);
    q = fmaf(z, q, 4.0587077f);
    q = fmaf(z, q, -4.9348021f);
    const float c = fmaf(z, q, 1.0f);
    cosine = quadrant & 1 ? s : c;
    sine = quadrant & 1 ? c : s;
    cosine = (quadrant + 1) & 2 ? -cosine : cosine;
    sine = quadrant & 2 ? -sine : sine;
}

// The same numbers in fp32, to a few units in the last place of each.
DDIM_FAST_HOST_DEVICE Normals fast_normals(const PhiloxWords& words) {
    Normals normals;
    for (int i = 0; i < 4; i += 2) {
        const float radius = box_muller_radius(words.word[i]);
        float cosine, sine;
        box_muller_direction(words.word[i + 1], cosine, sine);
        normals.value[i] = radius * cosine;
        normals.value[i + 1] = radius * sine;
    }
    return normals;
}

}  // namespace ddim_fast
