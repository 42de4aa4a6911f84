// A convolution of any kernel, stride and padding over channels_last images, as one matrix product: the linear layers and the
// convolutions of a U-Net that conv3x3 does not take.
//
//   out = convolution(x, weight) + bias + residual
//
// Sums are fp32 and taken in a fixed order: neither the number of images nor that of threads changes a bit.
#pragma once

#include <cstdint>

#include "common.h"

namespace ddim_fast {

template <typename T>
struct Product {
    const T* x;         // (images, height, width, in_channels)
    const T* weight;    // as prepare_product makes it
    const float* bias;  // (out_channels) or null
    const T* residual;  // like out, or null
    T* out;             // (images, out_height, out_width, out_channels); may be residual
    int64_t images;
    int64_t height;
    int64_t width;
    int64_t in_channels;
    int64_t out_height;
    int64_t out_width;
    int64_t out_channels;
    int64_t kernel_height;
    int64_t kernel_width;
    int64_t stride_height;
    int64_t stride_width;
    int64_t top;   // rows and columns of zeros before x; as many as are needed follow it
    int64_t left;
};

// The numbers that prepare_product makes of (out_channels, depth) weights, depth being kernel_height * kernel_width *
// in_channels.
int64_t prepared_product_numbers(int64_t out_channels, int64_t depth);

// weight: (out_channels, kernel_height, kernel_width, in_channels).
void prepare_product(const float* weight, float* out, int64_t out_channels, int64_t depth);
void prepare_product(const float* weight, bfloat16* out, int64_t out_channels, int64_t depth);

// On the host. bf16 needs a processor for which conv3x3_has_bf16.
void product(const Product<float>& op, int num_threads);
void product(const Product<bfloat16>& op, int num_threads);

}  // namespace ddim_fast
