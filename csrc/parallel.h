// Sharing work among threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ddim_fast {

// Calls body(begin, end) on consecutive parts of [0, count), one a thread, each but the last a multiple of `grain` long.
//
// The threads are OpenMP's, because torch's are: both find the same libgomp in a process and take turns on one pool.
// With a pool of our own, its threads and torch's, which spin while they wait, would fight for the same cores.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int64_t num_threads, const Body& body) {
    const int64_t grains = (count + grain - 1) / grain;
    const int64_t chunk = std::max<int64_t>(1, (grains + num_threads - 1) / num_threads) * grain;
    const int64_t parts = (count + chunk - 1) / chunk;
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1) if (parts > 1)
    for (int64_t part = 0; part < parts; ++part) body(part * chunk, std::min((part + 1) * chunk, count));
}

}  // namespace ddim_fast
