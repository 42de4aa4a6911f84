// Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), without mask or dropout:
//
//   out = softmax(scale query key^T) value
//
// Products and sums are fp32 and taken in a fixed order: neither the number of images nor that of threads changes a bit.
#pragma once

#include <cstdint>

#include "common.h"

namespace ddim_fast {

// Numbers from one image, head and token to the next; those of a token's dimensions lie beside each other.
struct TokenStrides {
    int64_t image;
    int64_t head;
    int64_t token;
};

template <typename T>
struct Attention {
    const T* query;  // (images, heads, queries, dim)
    const T* key;    // (images, heads, keys, dim)
    const T* value;  // like key
    T* out;          // like query
    TokenStrides query_strides;
    TokenStrides key_strides;
    TokenStrides value_strides;
    TokenStrides out_strides;
    int64_t images;
    int64_t heads;
    int64_t queries;
    int64_t keys;  // at least 1
    int64_t dim;
    float scale;
};

// On the host.
void attention(const Attention<float>& op, int num_threads);
void attention(const Attention<bfloat16>& op, int num_threads);

}  // namespace ddim_fast
