#include "group_norm_silu.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "group_norm_silu_kernel.h"
#include "parallel.h"

namespace ddim_fast {
namespace {

// About this many channels a task: a slab that stays in the second-level cache over the three passes, and rows of a
// channels_last image that fill whole cache lines.
constexpr int64_t kChannels = 64;

// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 1 << 13;

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// How a task's channels are cut changes no bit: a group is summed up in the same order wherever it stands.
template <typename T>
Cut cut(const GroupNormSilu<T>& op, int64_t threads) {
    const int64_t all = op.x_channels + op.skip_channels, group = all / op.groups;
    const int64_t whole = std::lcm(group, kWidestVector);  // whole groups and whole vectors
    const int64_t share = (all * op.images + threads - 1) / threads;  // of few channels, each thread gets some
    const int64_t most = whole <= kChannels ? std::clamp(round_up(share, whole), whole, kChannels / whole * whole)
                                            : round_up(kChannels, group);
    const int64_t channels = std::min(all, most);
    return {channels, (all + channels - 1) / channels, channels + kWidestVector};
}

template <typename T>
using RunTasks = void (*)(const GroupNormSilu<T>& op, const Cut& cut, int64_t begin, int64_t end, double* scratch);

template <typename T>
void run_parallel(const GroupNormSilu<T>& op, int num_threads, RunTasks<T> run) {
    const int64_t elements = op.images * (op.x_channels + op.skip_channels) * op.positions;
    if (elements == 0) return;
    const int64_t threads = std::clamp<int64_t>(elements / kGrain, 1, num_threads);
    const Cut tasks = cut(op, threads);
    parallel_for(op.images * tasks.tasks_an_image, 1, threads, [&](int64_t begin, int64_t end) {
        std::vector<double> scratch(tasks.width * 4);  // a row of doubles, and five of floats
        run(op, tasks, begin, end, scratch.data());
    });
}

}  // namespace

void group_norm_silu(const GroupNormSilu<float>& op, int num_threads) {
    run_parallel(op, num_threads, DDIM_FAST_CHOOSE(RunTasks<float>, run_tasks));
}

void group_norm_silu(const GroupNormSilu<bfloat16>& op, int num_threads) {
    auto run = DDIM_FAST_CHOOSE(RunTasks<bfloat16>, run_tasks);
#ifdef DDIM_FAST_X86
    if (has_avx512_bf16()) run = avx512bf16::run_tasks;
#endif
    run_parallel(op, num_threads, run);
}

}  // namespace ddim_fast
