// 3x3 convolution with stride 1 and padding 1 over channels_last images, by Winograd's F(2x2, 3x3) (Lavin and Gray 2016).
//
// A tile of 2x2 outputs takes 16 products for each pair of channels, not 36. Sums are fp32 and taken in a fixed order: neither
// the batch nor the number of threads changes a bit.
#pragma once

#include <cstdint>

#include "common.h"

namespace ddim_fast {

template <typename T>
struct Conv3x3 {
    const T* x;         // (images, height, width, in_channels)
    const T* weight;    // as prepare_conv3x3 makes it
    const float* bias;  // (out_channels) or null
    const T* residual;  // like out, added to it, or null
    T* out;             // (images, height, width, out_channels), twice as high and wide if upsample; may be residual
    int64_t images;
    int64_t height;
    int64_t width;
    int64_t in_channels;   // both multiples of kConv3x3Channels
    int64_t out_channels;
    bool upsample;  // convolves x with every pixel repeated in both directions, without making that image
};

constexpr int64_t kConv3x3Channels = 16;

// On the host. Products in bf16 need a processor that has them.
bool conv3x3_has_bf16();
void conv3x3(const Conv3x3<float>& op, int num_threads);
void conv3x3(const Conv3x3<bfloat16>& op, int num_threads);

// What conv3x3 multiplies by: 16 * out_channels * in_channels numbers, made once of (out_channels, in_channels, 3, 3) weights.
void prepare_conv3x3(const float* weight, float* out, int64_t out_channels, int64_t in_channels);
void prepare_conv3x3(const float* weight, bfloat16* out, int64_t out_channels, int64_t in_channels);

}  // namespace ddim_fast
