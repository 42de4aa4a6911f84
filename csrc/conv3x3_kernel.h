// The convolution of some tiles. Included by conv3x3.cpp once for each instruction set; DDIM_FAST_BF16 and DDIM_FAST_INT8 are
// defined where there are such products.

// Tiles, and vectors of output channels, whose sums fill the processor's registers.
#if DDIM_FAST_VECTOR_BITS == 512
constexpr int kRows = 6, kVectors = 4;
#elif DDIM_FAST_VECTOR_BITS == 256
constexpr int kRows = 6, kVectors = 1;
#else
constexpr int kRows = 3, kVectors = 1;
#endif

#define DDIM_FAST_UNROLL _Pragma("GCC unroll 16")

DDIM_FAST_INLINE void store_result(float* p, Vector v) { store(p, v); }

// What transform_pixels writes. Their scale is for 8 bits.
DDIM_FAST_INLINE void store_component(float* p, Vector v, float) { store(p, v); }

// What a sum is worth, and where it starts; both are for 8 bits.
struct Columns {
    const float* units;
    const int32_t* start;
};

// Products that are added one after the other. Their rounding errors grow with the length of the chain, so a longer sum is one
// of several chains.
constexpr int64_t kChain = 64;

// out[row] = sum over k of a[row][k] * b[k], for kRows rows and N vectors of columns.
template <int N>
DDIM_FAST_INLINE void multiply(const float* a, int64_t depth, const float* b, int64_t columns, float* out,
                               Columns) {
    for (int64_t begin = 0; begin < depth; begin += kChain) {
        Vector sums[kRows][N] = {};
        for (int64_t k = begin; k < smaller(begin + kChain, depth); ++k) {
            Vector right[N];
            DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) right[n] = load(b + k * columns + n * kLanes);
            DDIM_FAST_UNROLL for (int row = 0; row < kRows; ++row) {
                const Vector left = broadcast(a[row * depth + k]);
                DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) sums[row][n] += left * right[n];
            }
        }
        DDIM_FAST_UNROLL for (int row = 0; row < kRows; ++row)
            DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) {
                float* const result = out + row * columns + n * kLanes;
                store(result, begin == 0 ? sums[row][n] : load(result) + sums[row][n]);
            }
    }
}

#ifdef DDIM_FAST_BF16

// Without store's care for numbers below 2^-126, which become zero.
DDIM_FAST_INLINE void store_result(bfloat16* p, Vector v) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &half, sizeof half);
}

DDIM_FAST_INLINE void store_component(bfloat16* p, Vector v, float) { store_result(p, v); }

// The same on pairs of numbers along the depth, which lie beside each other in a and in b.
template <int N>
DDIM_FAST_INLINE void multiply(const bfloat16* a, int64_t depth, const bfloat16* b, int64_t columns, float* out,
                               Columns) {
    __m512 sums[kRows][N];
    DDIM_FAST_UNROLL for (int row = 0; row < kRows; ++row)
        DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) sums[row][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 2) {
        __m512bh right[N];
        DDIM_FAST_UNROLL for (int n = 0; n < N; ++n)
            right[n] = (__m512bh)_mm512_loadu_si512(b + k * columns + 2 * n * kLanes);
        DDIM_FAST_UNROLL for (int row = 0; row < kRows; ++row) {
            int pair;
            std::memcpy(&pair, a + row * depth + k, sizeof pair);
            const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
            DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) sums[row][n] = _mm512_dpbf16_ps(sums[row][n], left, right[n]);
        }
    }
    DDIM_FAST_UNROLL for (int row = 0; row < kRows; ++row)
        DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) _mm512_storeu_ps(out + row * columns + n * kLanes, sums[row][n]);
}

#endif

#ifdef DDIM_FAST_INT8

DDIM_FAST_INLINE void store_result(bfloat16* p, Vector v) { store(p, v); }

// Rounds to nearest even. NaN becomes the least number.
DDIM_FAST_INLINE void store_component(int8_t* p, Vector v, float steps) {
    const __m512i whole = _mm512_cvtps_epi32((__m512)(v * steps));
    // To 0..255, as the products want their left side.
    const __m128i bytes = _mm_xor_si128(_mm512_cvtsepi32_epi8(whole), _mm_set1_epi8(-128));
    std::memcpy(p, &bytes, sizeof bytes);
}

// The same on four numbers along the depth, which lie beside each other in a and in b.
template <int N>
DDIM_FAST_INLINE void multiply(const int8_t* a, int64_t depth, const int8_t* b, int64_t columns, float* out, Columns column) {
    LaneVector sums[kRows][N] = {};
    for (int64_t k = 0; k < depth; k += 4) {
        __m512i right[N];
        DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) right[n] = _mm512_loadu_si512(b + k * columns + 4 * n * kLanes);
        DDIM_FAST_UNROLL for (int row = 0; row < kRows; ++row) {
            int four;
            std::memcpy(&four, a + row * depth + k, sizeof four);
            const __m512i left = _mm512_set1_epi32(four);
            DDIM_FAST_UNROLL for (int n = 0; n < N; ++n)
                sums[row][n] = (LaneVector)_mm512_dpbusd_epi32((__m512i)sums[row][n], left, right[n]);
        }
    }
    DDIM_FAST_UNROLL for (int n = 0; n < N; ++n) {
        const Vector unit = load(column.units + n * kLanes);
        LaneVector start;
        std::memcpy(&start, column.start + n * kLanes, sizeof start);
        DDIM_FAST_UNROLL for (int row = 0; row < kRows; ++row)
            store(out + row * columns + n * kLanes, __builtin_convertvector(sums[row][n] + start, Vector) * unit);
    }
}

#endif

// The same for any number of columns up to kBlock, and of rows: whole kRows of them are computed.
template <typename W>
DDIM_FAST_INLINE void multiply_block(const W* a, int64_t rows, int64_t depth, const W* b, int64_t columns, float* out,
                                     Columns scales) {
    constexpr int64_t kBeside = sizeof(float) / sizeof(W);
    for (int64_t column = 0; column < columns; column += kVectors * kLanes) {
        const W* right = b + kBeside * column;
        const Columns there = {scales.units + column, scales.start + column};
        for (int64_t row = 0; row < rows; row += kRows) {
            const W* left = a + row * depth;
            float* result = out + row * columns + column;
            switch (smaller((columns - column) / kLanes, kVectors)) {
                case 1: multiply<1>(left, depth, right, columns, result, there); break;
#if DDIM_FAST_VECTOR_BITS == 512
                case 2: multiply<2>(left, depth, right, columns, result, there); break;
                case 3: multiply<3>(left, depth, right, columns, result, there); break;
                case 4: multiply<4>(left, depth, right, columns, result, there); break;
#endif
            }
        }
    }
}

// A tile's place: its image, and its number along each side.
struct Place {
    int64_t image, row, column;
};

template <typename T, typename W>
DDIM_FAST_INLINE Place place_of(const Conv3x3<T, W>& op, int64_t tile) {
    const int64_t columns = tile_columns(op), an_image = tile_rows(op) * columns;
    return {tile / an_image, tile % an_image / columns, tile % columns};
}

// B^T d B, d being the 4x4 pixels around a tile: 16 components, `stride` apart. zeros: a pixel's worth.
template <typename T, typename W>
DDIM_FAST_INLINE void transform_pixels(const Conv3x3<T, W>& op, Place tile, const T* zeros, W* out, int64_t stride) {
    const T* pixels[4][4];
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
            // They begin one before the tile. In the enlarged image the middle two are one pixel of x.
            const int64_t row = op.upsample ? tile.row + (i + 1) / 2 - 1 : 2 * tile.row + i - 1;
            const int64_t column = op.upsample ? tile.column + (j + 1) / 2 - 1 : 2 * tile.column + j - 1;
            const bool inside = row >= 0 && row < op.height && column >= 0 && column < op.width;
            pixels[i][j] = inside ? op.x + ((tile.image * op.height + row) * op.width + column) * op.in_channels : zeros;
        }
    }
    for (int64_t c = 0; c < op.in_channels; c += kLanes) {
        Vector half[4][4];
        DDIM_FAST_UNROLL for (int j = 0; j < 4; ++j) {
            const Vector d0 = load(pixels[0][j] + c), d1 = load(pixels[1][j] + c);
            const Vector d2 = load(pixels[2][j] + c), d3 = load(pixels[3][j] + c);
            half[0][j] = d0 - d2, half[1][j] = d1 + d2, half[2][j] = d2 - d1, half[3][j] = d1 - d3;
        }
        DDIM_FAST_UNROLL for (int i = 0; i < 4; ++i) {
            const Vector* d = half[i];
            const Vector components[4] = {d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]};
            DDIM_FAST_UNROLL for (int j = 0; j < 4; ++j)
                store_component(out + (4 * i + j) * stride + c, components[j], kInt8<W> ? op.scales.steps[4 * i + j] : 0.0f);
        }
    }
}

// With every pixel repeated, d1 = d2: these components are zero.
DDIM_FAST_INLINE bool vanishes(bool upsample, int64_t component) {
    return upsample && (component / 4 == 2 || component % 4 == 2);
}

// A^T m A and what is added to it: `columns` channels, from `first` on, of a tile's 2x2 outputs.
template <typename T, typename W>
DDIM_FAST_INLINE void transform_sums(const Conv3x3<T, W>& op, Place tile, const float* m, int64_t stride, int64_t first,
                                     int64_t columns) {
    const int64_t scale = op.upsample ? 2 : 1, height = scale * op.height, width = scale * op.width;
    const int64_t corner = ((tile.image * height + 2 * tile.row) * width + 2 * tile.column) * op.out_channels + first;
    const int64_t rows_there = smaller(2, height - 2 * tile.row), columns_there = smaller(2, width - 2 * tile.column);
    for (int64_t c = 0; c < columns; c += kLanes) {
        const auto component = [&](int i, int j) __attribute__((always_inline)) {
            return vanishes(op.upsample, 4 * i + j) ? Vector{} : load(m + (4 * i + j) * stride + c);
        };
        Vector half[2][4];
        DDIM_FAST_UNROLL for (int j = 0; j < 4; ++j) {
            const Vector m1 = component(1, j), m2 = component(2, j);
            half[0][j] = component(0, j) + m1 + m2, half[1][j] = m1 - m2 - component(3, j);
        }
        const Vector bias = op.bias ? load(op.bias + first + c) : Vector{};
        for (int64_t i = 0; i < rows_there; ++i) {
            const Vector* h = half[i];
            const Vector y[2] = {h[0] + h[1] + h[2], h[1] - h[2] - h[3]};
            for (int64_t j = 0; j < columns_there; ++j) {
                const int64_t at = corner + (i * width + j) * op.out_channels + c;
                store_result(op.out + at, y[j] + bias + (op.residual ? load(op.residual + at) : Vector{}));
            }
        }
    }
}

// The tiles [begin, end), and the blocks [first_block, last_block) of kBlock output channels. scratch: scratch_bytes.
template <typename T, typename W>
void run_tiles(const Conv3x3<T, W>& op, int64_t begin, int64_t end, int64_t first_block, int64_t last_block, void* scratch) {
    const int64_t depth = op.in_channels, tiles = end - begin, rows = (tiles + kRows - 1) / kRows * kRows;
    T* const zeros = static_cast<T*>(scratch);
    W* const pixels = reinterpret_cast<W*>(zeros + depth);  // (16, rows, depth); rows beyond the tiles are computed, but not read
    float* const sums = reinterpret_cast<float*>(pixels + 16 * rows * depth);  // (16, rows, columns)
    std::memset(zeros, 0, depth * sizeof(T));
    for (int64_t i = 0; i < tiles; ++i) transform_pixels(op, place_of(op, begin + i), zeros, pixels + i * depth, rows * depth);
    for (int64_t component = 0; component < 16; ++component)
        std::memset(pixels + (component * rows + tiles) * depth, 0, (rows - tiles) * depth * sizeof(W));
    for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t first = block * kBlock, columns = smaller(kBlock, op.out_channels - first);
        for (int64_t component = 0; component < 16; ++component) {
            if (vanishes(op.upsample, component)) continue;
            const int64_t at = component * op.out_channels + first;
            const Columns scales = {kInt8<W> ? op.scales.units + at : nullptr, kInt8<W> ? op.scales.start + at : nullptr};
            multiply_block(pixels + component * rows * depth, rows, depth, op.weight + at * depth, columns,
                           sums + component * rows * columns, scales);
        }
        for (int64_t i = 0; i < tiles; ++i)
            transform_sums(op, place_of(op, begin + i), sums + i * columns, rows * columns, first, columns);
    }
}
