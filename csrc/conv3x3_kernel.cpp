// The convolution of some tiles. Compiled once for each instruction set (see instruction_set.h), and once more for each that
// has products of bf16 or of 8-bit numbers.
#include "conv3x3_kernel.h"

#include "multiply.h"

namespace ddim_fast::DDIM_FAST_ISA {
namespace {

// A component of a task's tiles and a block's weights: out is (rows, kBlock).
template <typename T, typename W>
DDIM_FAST_INLINE void multiply_block(const Conv3x3<T, W>& op, int64_t component, int64_t first, int64_t channels, const W* a,
                                     int64_t rows, float* out) {
    constexpr int64_t kStrip = kVectors * kLanes;
    const int64_t depth = op.in_channels, last = components(op.tile) * op.out_channels - kStrip;
    for (int64_t k = 0; k < channels; k += kStrip) {
        const int64_t width = smaller(kStrip, channels - k), at = component * op.out_channels + first + k;
        for (int64_t row = 0; row < rows; row += kTileGroup) {
            Aside<W> aside;
            if constexpr (kInt8<W>) aside = {op.scales.units + at, op.scales.start + at};
            if constexpr (sizeof(W) == sizeof(float)) {
                // The strip that follows this one in its block, or in the next component's.
                const int64_t next = at + kStrip + (k + kStrip < channels ? 0 : op.out_channels - channels);
                const int64_t bytes = width * sizeof(float) * kTileGroup / rows;
                const char* const weights = reinterpret_cast<const char*>(op.weight + smaller(next, last) * depth);
                aside = {weights + row / kTileGroup * bytes * depth, bytes};
            }
            multiply_up_to<kVectors>(Left<W>{a + row * depth, depth, 1}, depth, op.weight + at * depth, width, width,
                                     out + row * kBlock + k, aside);
        }
    }
}

// ---- Transforms ----

// Winograd's F(m, 3) in one dimension: m outputs from m + 2 pixels and as many products (Lavin and Gray 2016).
template <int kTile>
struct Winograd;

// At the points 0, 1, -1 and infinity.
template <>
struct Winograd<2> {
    static DDIM_FAST_INLINE void components(const Vector (&d)[4], Vector (&v)[4]) {
        v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
    }
    static DDIM_FAST_INLINE void outputs(const Vector (&m)[4], Vector (&y)[2]) {
        y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
    }
};

// At the points 0, a, -a, b, -b and infinity: see conv3x3.h.
template <>
struct Winograd<4> {
    static constexpr float a = kWinogradA, b = kWinogradB, aa = a * a, bb = b * b;

    static DDIM_FAST_INLINE void components(const Vector (&d)[6], Vector (&v)[6]) {
        const Vector even_a = d[4] - bb * d[2], odd_a = a * (d[3] - bb * d[1]);
        const Vector even_b = d[4] - aa * d[2], odd_b = b * (d[3] - aa * d[1]);
        v[0] = d[4] - (aa + bb) * d[2] + (aa * bb) * d[0];
        v[1] = even_a + odd_a, v[2] = even_a - odd_a;
        v[3] = even_b + odd_b, v[4] = even_b - odd_b;
        v[5] = d[5] - (aa + bb) * d[3] + (aa * bb) * d[1];
    }
    static DDIM_FAST_INLINE void outputs(const Vector (&m)[6], Vector (&y)[4]) {
        const Vector even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
        y[0] = m[0] + even_a + even_b;
        y[1] = a * odd_a + b * odd_b;
        y[2] = aa * even_a + bb * even_b;
        y[3] = (aa * a) * odd_a + (bb * b) * odd_b + m[5];
    }
};

// A tile's place: its image, and its number along each side.
struct Place {
    int64_t image, row, column;
};

template <typename T, typename W>
DDIM_FAST_INLINE Place place_of(const Conv3x3<T, W>& op, int64_t tile) {
    const int64_t columns = tiles_along(op, op.width), an_image = tiles_along(op, op.height) * columns;
    return {tile / an_image, tile % an_image / columns, tile % columns};
}

// B^T d B, d being the pixels around a tile: its components, `stride` apart. zeros: a pixel's worth.
template <int kTile, typename T, typename W>
DDIM_FAST_INLINE void transform_pixels(const Conv3x3<T, W>& op, Place tile, const T* zeros, W* out, int64_t stride) {
    constexpr int kSide = kTile + 2;
    const T* pixels[kSide][kSide];
    for (int i = 0; i < kSide; ++i) {
        for (int j = 0; j < kSide; ++j) {
            // They begin one before the tile. In the enlarged image the middle two are one pixel of x.
            const int64_t row = op.upsample ? tile.row + (i + 1) / 2 - 1 : kTile * tile.row + i - 1;
            const int64_t column = op.upsample ? tile.column + (j + 1) / 2 - 1 : kTile * tile.column + j - 1;
            const bool inside = row >= 0 && row < op.height && column >= 0 && column < op.width;
            pixels[i][j] = inside ? op.x + ((tile.image * op.height + row) * op.width + column) * op.in_channels : zeros;
        }
    }
    for (int64_t c = 0; c < op.in_channels; c += kLanes) {
        Vector half[kSide][kSide];
        DDIM_FAST_UNROLL for (int j = 0; j < kSide; ++j) {
            Vector d[kSide], v[kSide];
            DDIM_FAST_UNROLL for (int i = 0; i < kSide; ++i) d[i] = load(pixels[i][j] + c);
            Winograd<kTile>::components(d, v);
            DDIM_FAST_UNROLL for (int i = 0; i < kSide; ++i) half[i][j] = v[i];
        }
        DDIM_FAST_UNROLL for (int i = 0; i < kSide; ++i) {
            Vector v[kSide];
            Winograd<kTile>::components(half[i], v);
            DDIM_FAST_UNROLL for (int j = 0; j < kSide; ++j) {
                float steps = 0;
                if constexpr (kInt8<W>) steps = op.scales.steps[kSide * i + j];
                store_component(out + (kSide * i + j) * stride + c, v[j], steps);
            }
        }
    }
}

// With every pixel repeated, d1 = d2: these components of F(2x2, 3x3) are zero.
DDIM_FAST_INLINE bool vanishes(bool upsample, int64_t component) {
    return upsample && (component / 4 == 2 || component % 4 == 2);
}

// A^T m A and what is added to it: `channels` of a tile's outputs, from `first` on. m's components lie `stride` apart.
template <int kTile, typename T, typename W>
DDIM_FAST_INLINE void transform_sums(const Conv3x3<T, W>& op, Place tile, const float* m, int64_t stride, int64_t first,
                                     int64_t channels) {
    constexpr int kSide = kTile + 2;
    const int64_t scale = op.upsample ? 2 : 1, height = scale * op.height, width = scale * op.width;
    const int64_t corner = ((tile.image * height + kTile * tile.row) * width + kTile * tile.column) * op.out_channels + first;
    const int64_t rows_there = smaller(kTile, height - kTile * tile.row);
    const int64_t columns_there = smaller(kTile, width - kTile * tile.column);
    for (int64_t c = 0; c < channels; c += kLanes) {
        Vector half[kTile][kSide];
        DDIM_FAST_UNROLL for (int j = 0; j < kSide; ++j) {
            Vector sums[kSide], y[kTile];
            DDIM_FAST_UNROLL for (int i = 0; i < kSide; ++i) {
                const int component = kSide * i + j;
                sums[i] = vanishes(op.upsample, component) ? Vector{} : load(m + component * stride + c);
            }
            Winograd<kTile>::outputs(sums, y);
            DDIM_FAST_UNROLL for (int i = 0; i < kTile; ++i) half[i][j] = y[i];
        }
        const Vector bias = op.bias ? load(op.bias + first + c) : Vector{};
        for (int64_t i = 0; i < rows_there; ++i) {
            Vector y[kTile];
            Winograd<kTile>::outputs(half[i], y);
            for (int64_t j = 0; j < columns_there; ++j) {
                const int64_t at = corner + (i * width + j) * op.out_channels + c;
                store(op.out + at, y[j] + bias + (op.residual ? load(op.residual + at) : Vector{}));
            }
        }
    }
}

template <int kTile, typename T, typename W>
void run(const Conv3x3<T, W>& op, const Part& part, void* memory) {
    const int64_t depth = op.in_channels, tiles = part.end - part.begin;
    const Scratch<T, W> scratch(op, tiles);
    char* const bytes = static_cast<char*>(memory);
    T* const zeros = reinterpret_cast<T*>(bytes);
    W* const pixels = reinterpret_cast<W*>(bytes + scratch.zeros_bytes);
    float* const sums = reinterpret_cast<float*>(bytes + scratch.zeros_bytes + scratch.pixel_bytes);
    memset(zeros, 0, depth * sizeof(T));
    for (int64_t i = 0; i < tiles; ++i)
        transform_pixels<kTile>(op, place_of(op, part.begin + i), zeros, pixels + i * depth, scratch.pixel_stride);
    for (int64_t component = 0; component < components(kTile); ++component)
        memset(pixels + component * scratch.pixel_stride + tiles * depth, 0, (scratch.rows - tiles) * depth * sizeof(W));
    for (int64_t block = part.first_block; block < part.last_block; ++block) {
        const int64_t first = block * kBlock, channels = smaller(kBlock, op.out_channels - first);
        for (int64_t component = 0; component < components(kTile); ++component)
            if (!vanishes(op.upsample, component))
                multiply_block(op, component, first, channels, pixels + component * scratch.pixel_stride, scratch.rows,
                               sums + component * scratch.sum_stride);
        for (int64_t i = 0; i < tiles; ++i)
            transform_sums<kTile>(op, place_of(op, part.begin + i), sums + i * kBlock, scratch.sum_stride, first, channels);
    }
}

}  // namespace

#if defined(__AVX512BF16__)
void run_tiles(const Conv3x3<bfloat16>& op, const Part& part, void* scratch) { run<2>(op, part, scratch); }
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
void run_tiles(const Conv3x3<float, int8_t>& op, const Part& part, void* scratch) { run<2>(op, part, scratch); }

void run_tiles(const Conv3x3<bfloat16, int8_t>& op, const Part& part, void* scratch) { run<2>(op, part, scratch); }
#else
void run_tiles(const Conv3x3<float>& op, const Part& part, void* scratch) {
    op.tile == 4 ? run<4>(op, part, scratch) : run<2>(op, part, scratch);
}
#endif

}  // namespace ddim_fast::DDIM_FAST_ISA
