// Where prepared weights lie, in the order in which products read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common.h"
#include "tile.h"

namespace ddim_fast {

// A weight's place: (components, strips of columns, depth, columns of the strip), but as many numbers along the depth beside
// each other as fill 32 bits. `columns` are the weights' of one component, all of the strips' width but the last.
template <typename W>
W* place_of_weight(W* out, int64_t component, int64_t column, int64_t k, int64_t columns, int64_t depth) {
    constexpr int64_t kBeside = sizeof(float) / sizeof(W);
    const int64_t strip = DDIM_FAST_CHOOSE(int64_t, strip_columns), first = column / strip * strip;
    const int64_t width = std::min(strip, columns - first);
    return out + (component * columns + first) * depth + (k / kBeside * width + column - first) * kBeside + k % kBeside;
}

inline void write(float* p, float value) { *p = value; }

// Rounded to nearest even; NaN stays NaN.
inline void write(bfloat16* p, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
    p->bits = static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

}  // namespace ddim_fast
