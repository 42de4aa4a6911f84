#include "ddim_step.h"

#include "parallel.h"
#include "philox.h"
#include "vector.h"

namespace ddim_fast {
namespace {

// Elements that are worth a thread of their own: below two grains, starting a second one costs more than it saves.
// Drawing noise takes some thirty times as long as the rest.
constexpr int64_t kGrain = 1 << 19;
constexpr int64_t kNoiseGrain = 1 << 14;

// Whole cache lines to each thread, so that no two write to the same one.
constexpr int64_t kLine = 64 / sizeof(bfloat16);

// Elements whose noise is drawn at once.
constexpr int64_t kTile = 1024;

// z <- the noise of elements [begin, begin + count), counted over all images.
void draw_noise(const DdimStep& op, int64_t begin, int64_t count, float* z) {
    Normals normals;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t image = (begin + i) / op.image_numel, element = (begin + i) % op.image_numel;
        if (i == 0 || element % 4 == 0)
            normals = exact_normals(noise_words(op.seeds[image], op.step, static_cast<uint32_t>(element / 4)));
        z[i] = normals.value[element % 4];
    }
}

// kFull: sixteen elements, and `count` of them otherwise.
template <bool kFull>
DDIM_FAST_INLINE Vector load_elements(const void* base, Dtype dtype, int64_t i, int64_t count) {
    if (dtype == Dtype::bf16) {
        const auto* p = static_cast<const bfloat16*>(base) + i;
        return kFull ? load(p) : load_some(p, count);
    }
    const auto* p = static_cast<const float*>(base) + i;
    return kFull ? load(p) : load_some(p, count);
}

template <bool kFull>
DDIM_FAST_INLINE void store_elements(void* base, Dtype dtype, int64_t i, Vector value, int64_t count) {
    if (dtype == Dtype::bf16) {
        auto* p = static_cast<bfloat16*>(base) + i;
        kFull ? store(p, value) : store_some(p, value, count);
    } else {
        auto* p = static_cast<float*>(base) + i;
        kFull ? store(p, value) : store_some(p, value, count);
    }
}

// The elements i, i + 1, ...; z is their noise, or null.
template <bool kFull>
DDIM_FAST_INLINE void step_elements(const DdimStep& op, int64_t i, const void* z, Dtype z_dtype, int64_t z_at, int64_t count) {
    const Vector x = load_elements<kFull>(op.sample, op.sample_dtype, i, count);
    Vector m = load_elements<kFull>(op.model_output, op.output_dtype, i, count);
    if (op.unconditional) {
        const Vector n = load_elements<kFull>(op.unconditional, op.output_dtype, i, count);
        m = n + op.guidance * (m - n);
    }
    Vector out = ddim_step_element(x, m, op.coefficients, op.clip);
    if (z) out += op.coefficients.sigma * load_elements<kFull>(z, z_dtype, z_at, count);
    store_elements<kFull>(op.out, op.out_dtype, i, out, count);
}

DDIM_FAST_FOR_EACH_CPU
void step_range(const DdimStep& step, int64_t begin, int64_t end) {
    const DdimStep op = step;  // a copy, which writing to out cannot change
    const bool drawn = op.seeds && op.coefficients.sigma != 0;
    float tile[kTile];
    const void* z = drawn ? tile : op.noise;
    const Dtype z_dtype = drawn ? Dtype::fp32 : op.sample_dtype;
    while (begin < end) {
        const int64_t stop = drawn ? std::min(begin + kTile, end) : end, origin = drawn ? begin : 0;
        if (drawn) draw_noise(op, begin, stop - begin, tile);
        for (; begin + kLanes <= stop; begin += kLanes) step_elements<true>(op, begin, z, z_dtype, begin - origin, kLanes);
        if (begin < stop) step_elements<false>(op, begin, z, z_dtype, begin - origin, stop - begin);
        begin = stop;
    }
}

}  // namespace

void ddim_step(const DdimStep& op, int num_threads) {
    const int64_t threads = std::clamp<int64_t>(op.numel / (op.seeds ? kNoiseGrain : kGrain), 1, num_threads);
    parallel_for(op.numel, kLine, threads, [&](int64_t begin, int64_t end) { step_range(op, begin, end); });
}

}  // namespace ddim_fast
