// Sixteen floats at a time, with GCC's (12 or later) and Clang's vector extension: whatever the processor has, the compiler
// splits them into its registers. Included by each_cpu.h once for each instruction set.

constexpr int64_t kLanes = 16;

typedef float Vector __attribute__((vector_size(64)));
typedef double WideVector __attribute__((vector_size(128)));
typedef uint32_t BitsVector __attribute__((vector_size(64)));
typedef uint16_t HalfBitsVector __attribute__((vector_size(32)));
typedef uint16_t HalvesVector __attribute__((vector_size(64)));
typedef int32_t LaneVector __attribute__((vector_size(64)));

DDIM_FAST_INLINE Vector broadcast(float value) { return value - Vector{}; }

DDIM_FAST_INLINE float to_float(float value) { return value; }

DDIM_FAST_INLINE float to_float(bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

DDIM_FAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

DDIM_FAST_INLINE WideVector widen(Vector v) { return __builtin_convertvector(v, WideVector); }

// Shuffles, or loops for compilers that have no such builtin. Numbers lie in memory with the low half first.
#if __has_builtin(__builtin_shufflevector)

DDIM_FAST_INLINE double add_lanes(WideVector v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1);
    return v[0] + v[1];
}

// Sixteen 16-bit numbers as the upper halves of 32-bit ones.
DDIM_FAST_INLINE BitsVector upper_halves(HalfBitsVector bits) {
    return (BitsVector)__builtin_shufflevector(bits, HalfBitsVector{}, 16, 0, 16, 1, 16, 2, 16, 3, 16, 4, 16, 5, 16, 6, 16, 7, 16, 8,
                                               16, 9, 16, 10, 16, 11, 16, 12, 16, 13, 16, 14, 16, 15);
}

// The inverse.
DDIM_FAST_INLINE HalfBitsVector upper_halves_of(BitsVector bits) {
    const HalvesVector halves = (HalvesVector)bits;
    return __builtin_shufflevector(halves, halves, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

#else

DDIM_FAST_INLINE double add_lanes(WideVector v) {
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
}

DDIM_FAST_INLINE BitsVector upper_halves(HalfBitsVector bits) { return __builtin_convertvector(bits, BitsVector) << 16; }

DDIM_FAST_INLINE HalfBitsVector upper_halves_of(BitsVector bits) { return __builtin_convertvector(bits >> 16, HalfBitsVector); }

#endif

// All ones in the first `count` lanes.
DDIM_FAST_INLINE LaneVector first_lanes(int64_t count) {
    const LaneVector lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < static_cast<int32_t>(count);
}

DDIM_FAST_INLINE Vector load(const float* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

DDIM_FAST_INLINE Vector load(const bfloat16* p) {
    HalfBitsVector bits;
    std::memcpy(&bits, p, sizeof bits);
    return (Vector)upper_halves(bits);
}

DDIM_FAST_INLINE void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest even; NaN stays NaN.
DDIM_FAST_INLINE void store(bfloat16* p, Vector v) {
    const BitsVector bits = (BitsVector)v;
    const BitsVector rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    const BitsVector word = (bits & 0x7FFFFFFF) > 0x7F800000 ? bits | 0x400000 : rounded;
    const HalfBitsVector half = upper_halves_of(word);
    std::memcpy(p, &half, sizeof half);
}

// The first `count` of them, the rest zero.
template <typename T>
DDIM_FAST_INLINE Vector load_some(const T* p, int64_t count) {
    T padded[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
    return load(padded);
}

template <typename T>
DDIM_FAST_INLINE void store_some(T* p, Vector v, int64_t count) {
    T padded[kLanes];
    store(padded, v);
    for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

// e^x to 2 ulp where it is a normal number: 2^n times a polynomial on [-ln2/2, ln2/2]. NaN stays NaN.
DDIM_FAST_INLINE Vector exponential(Vector x) {
    x = x > 88.0f ? broadcast(88.0f) : x;
    x = x < -87.0f ? broadcast(-87.0f) : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const Vector shifted = x * 1.44269504088896341f + magic;
    const Vector n = shifted - magic;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // The integer becomes the exponent of 2^n; the magic number's own bits are shifted out.
    return p * (Vector)(((BitsVector)shifted << 23) + 0x3F800000u);
}

DDIM_FAST_INLINE Vector silu(Vector y) { return y / (1.0f + exponential(-y)); }

