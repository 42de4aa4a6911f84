#include "ddim_step.h"

#include "ddim_step_kernel.h"
#include "parallel.h"
#include "philox.h"

namespace ddim_fast {
namespace {

// Elements that are worth a thread of their own: below two grains, starting a second one costs more than it saves.
// Drawing noise takes some thirty times as long as the rest.
constexpr int64_t kGrain = 1 << 16;
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

using StepRange = decltype(&baseline::step_range);

void step_range(StepRange run, const DdimStep& op, int64_t begin, int64_t end) {
    if (!op.seeds || op.coefficients.sigma == 0) return run(op, begin, end, op.noise, op.sample_dtype, 0);
    float tile[kTile];
    for (; begin < end; begin += kTile) {
        const int64_t stop = std::min(begin + kTile, end);
        draw_noise(op, begin, stop - begin, tile);
        run(op, begin, stop, tile, Dtype::fp32, begin);
    }
}

}  // namespace

void ddim_step(const DdimStep& op, int num_threads) {
    StepRange run = DDIM_FAST_CHOOSE(StepRange, step_range);
    const int64_t threads = std::clamp<int64_t>(op.numel / (op.seeds ? kNoiseGrain : kGrain), 1, num_threads);
    parallel_for(op.numel, kLine, threads, [&](int64_t begin, int64_t end) { step_range(run, op, begin, end); });
}

}  // namespace ddim_fast
