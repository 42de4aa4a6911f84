// GroupNorm and what stands around it in a U-Net.
//
//   v   = concat(x, skip) + pre_shift             skip along the channels; pre_shift one number a channel and image
//   y   = (v - mean) / sqrt(var + eps) * weight + bias      mean and variance of each image's groups of channels
//   y   = y * (1 + scale) + shift                 one number a channel and image
//   out = silu(y) + residual
//
// Every part but the norm is optional. Sums are fp32 and taken in a fixed order.
#pragma once

#include <cstdint>

#include "common.h"

namespace ddim_fast {

template <typename T>
struct GroupNormSilu {
    const T* x;               // (images, x_channels, positions), or (images, positions, x_channels) if channels_last
    const T* skip;            // the same with skip_channels; null where there are none
    const T* residual;        // like out, or null
    T* out;                   // x_channels + skip_channels channels; may be x where there is no skip, or residual
    const float* weight;      // (channels)
    const float* bias;        // (channels)
    const float* pre_shift;   // (images, channels) or null, images pre_shift_stride apart
    const float* scale;       // (images, channels) or null
    const float* shift;       // (images, channels) or null
    int64_t images;
    int64_t x_channels;
    int64_t skip_channels;
    int64_t positions;        // height * width
    int64_t groups;           // a divisor of the channels
    int64_t pre_shift_stride;  // 0: all images have the same
    float eps;
    bool silu;
    bool channels_last;
};

// On the host. Neither the batch nor the number of threads changes a bit.
void group_norm_silu(const GroupNormSilu<float>& op, int num_threads);
void group_norm_silu(const GroupNormSilu<bfloat16>& op, int num_threads);

// On the current CUDA device, queued on stream (a cudaStream_t) without waiting for it; x, skip, residual and out are of
// `dtype`. workspace: device memory of group_norm_silu_cuda_workspace bytes, which depends on the sizes, the layout and the
// device alone; null where that is 0. Throws std::invalid_argument for groups of more than 2048 channels and
// std::runtime_error when CUDA fails.
void group_norm_silu_cuda(const GroupNormSilu<void>& op, Dtype dtype, void* workspace, void* stream);
int64_t group_norm_silu_cuda_workspace(const GroupNormSilu<void>& op, Dtype dtype);

}  // namespace ddim_fast
