#include "group_norm_silu.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <numeric>
#include <vector>

// The module is compiled without fused multiply-adds, for the sake of the DDIM step's bits. Here they are welcome: the
// exponential takes two thirds of the time with them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

#include "parallel.h"

namespace ddim_fast {
namespace {

// How an image's channels are cut into tasks, all but the last of the same size.
struct Cut {
    int64_t channels;  // a task, whole groups
    int64_t tasks_an_image;
    int64_t width;  // numbers in a row of a task's scratch memory

    template <typename T>
    explicit Cut(const GroupNormSilu<T>& op);
};

}  // namespace
}  // namespace ddim_fast

#define DDIM_FAST_KERNEL "group_norm_silu_kernel.h"
#include "each_cpu.h"

namespace ddim_fast {
namespace {

// About this many channels a task: a slab that stays in the second-level cache over the three passes, and rows of a
// channels_last image that fill whole cache lines.
constexpr int64_t kChannels = 64;

// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 1 << 15;

template <typename T>
Cut::Cut(const GroupNormSilu<T>& op) {
    const int64_t all = op.x_channels + op.skip_channels, group = all / op.groups;
    const int64_t whole = std::lcm(group, baseline::kLanes);  // whole groups and whole vectors
    channels = std::min(all, whole <= kChannels ? kChannels / whole * whole : (kChannels + group - 1) / group * group);
    tasks_an_image = (all + channels - 1) / channels;
    width = channels + baseline::kLanes;
}

template <typename T>
void run_parallel(const GroupNormSilu<T>& op, int num_threads) {
    const Cut cut(op);
    const int64_t elements = op.images * (op.x_channels + op.skip_channels) * op.positions;
    if (elements == 0) return;
    const int64_t threads = std::clamp<int64_t>(elements / kGrain, 1, num_threads);
    const auto run = DDIM_FAST_FOR_THIS_CPU(run_tasks<T>);
    parallel_for(op.images * cut.tasks_an_image, 1, threads, [&](int64_t begin, int64_t end) {
        std::vector<double> scratch(cut.width * 4);  // a row of doubles, and five of floats
        run(op, cut, begin, end, scratch.data());
    });
}

}  // namespace

void group_norm_silu(const GroupNormSilu<float>& op, int num_threads) { run_parallel(op, num_threads); }

void group_norm_silu(const GroupNormSilu<bfloat16>& op, int num_threads) { run_parallel(op, num_threads); }

}  // namespace ddim_fast
