// 3x3 convolution with stride 1 and padding 1 over channels_last images, by Winograd's F(2x2, 3x3) or F(4x4, 3x3) (Lavin and
// Gray 2016).
//
// A tile of 2x2 outputs takes 16 products for each pair of channels, not 36, and one of 4x4 takes 36, not 144: one for each
// component of the transformed pixels. Products are of fp32 or bf16 numbers, as the images are, or of 8-bit ones, whose scales are a component's. Sums are fp32, or
// exact, and taken in a fixed order: neither the batch nor the number of threads changes a bit.
#pragma once

#include <cstdint>

#include "common.h"

namespace ddim_fast {

// A component v of a pixel counts as round(steps * v), from -128 to 127; the sum of its products with the weights of an output
// channel, each round(weight / its unit), is worth `unit` a piece.
struct Int8Scales {
    const float* steps;    // (16)
    const float* units;    // (16, out_channels)
    const int32_t* start;  // (16, out_channels): pixels are shifted by 128 to have no sign, and sums start from what undoes it
};

// T: the images; W: what is multiplied, T or int8_t.
template <typename T, typename W = T>
struct Conv3x3 {
    const T* x;         // (images, height, width, in_channels)
    const W* weight;    // as prepare_conv3x3 makes it
    const float* bias;  // (out_channels) or null
    const T* residual;  // like out, added to it, or null
    T* out;             // (images, height, width, out_channels), twice as high and wide if upsample; may be residual
    int64_t images;
    int64_t height;
    int64_t width;
    int64_t in_channels;   // both multiples of kConv3x3Channels
    int64_t out_channels;
    bool upsample;  // convolves x with every pixel repeated in both directions, without making that image
    int tile;       // 2 or 4 outputs along each side of a tile; 4 is for fp32 products without upsample
    Int8Scales scales;  // if W is int8_t
};

constexpr int64_t kConv3x3Channels = 16;

// F(4x4, 3x3) evaluates polynomials at 0, a, -a, b, -b and infinity. Of the numbers that have few bits, so that their products
// are exact, these lose the fewest digits: half as many as the usual 1 and 2. (Barabasz et al. 2020 is on choosing points.)
constexpr float kWinogradA = 0.625f, kWinogradB = 1.5f;

template <typename W>
constexpr bool kInt8 = sizeof(W) == 1;

constexpr int64_t components(int tile) { return (tile + 2) * (tile + 2); }

// Tiles along a side of x. With upsample, a tile is what becomes of one pixel.
template <typename T, typename W>
constexpr int64_t tiles_along(const Conv3x3<T, W>& op, int64_t side) {
    return op.upsample ? side : (side + op.tile - 1) / op.tile;
}

// On the host. Products in bf16 and of 8-bit numbers need a processor that has them.
bool conv3x3_has_bf16();
bool conv3x3_has_int8();
void conv3x3(const Conv3x3<float>& op, int num_threads);
void conv3x3(const Conv3x3<bfloat16>& op, int num_threads);
void conv3x3(const Conv3x3<float, int8_t>& op, int num_threads);
void conv3x3(const Conv3x3<bfloat16, int8_t>& op, int num_threads);

// What conv3x3 multiplies by: components(tile) * out_channels * in_channels numbers, made once of (out_channels, in_channels,
// 3, 3) weights, in the order that the instruction set in use wants.
void prepare_conv3x3(const float* weight, float* out, int64_t out_channels, int64_t in_channels, int tile);
void prepare_conv3x3(const float* weight, bfloat16* out, int64_t out_channels, int64_t in_channels);

// The same in 8 bits. steps: (16), given; units and start: (16, out_channels), results.
void prepare_conv3x3(const float* weight, const float* steps, int8_t* out, float* units, int32_t* start, int64_t out_channels,
                     int64_t in_channels);

}  // namespace ddim_fast
