// Sharing work among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ddim_fast {

// Threads that run the same calls side by side, see run_in_team.
struct Team {
    int threads;
    std::exception_ptr error;  // the first one
};

// The team of the calling thread, and its number there; null outside of teams.
inline thread_local Team* team = nullptr;
inline thread_local int team_number = 0;

// Calls body(); what it throws is the team's error, unless there is one already.
template <typename Body>
void keep_error(const Body& body) {
    try {
        body();
    } catch (...) {
#pragma omp critical(ddim_fast_team)
        if (!team->error) team->error = std::current_exception();
    }
}

// Memory of the calling thread, of cache lines: the same at each call.
inline char* scratch_memory(int64_t bytes) {
    constexpr int64_t kLine = 64;
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local int64_t size = 0;
    if (size < bytes) {
        memory.reset();
        size = 0;
        memory.reset(new char[bytes + kLine]);
        size = bytes;
    }
    return memory.get() + (kLine - reinterpret_cast<uintptr_t>(memory.get()) % kLine);
}

// Calls body(begin, end) on consecutive parts of [0, count), one a thread, each but the last a multiple of `grain` long. In a
// team, all threads come here with the same arguments; each takes its part and waits for the others.
//
// The threads are OpenMP's, because torch's are: both find the same libgomp in a process and take turns on one pool.
// With a pool of our own, its threads and torch's, which spin while they wait, would fight for the same cores.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int64_t num_threads, const Body& body) {
    const int64_t grains = (count + grain - 1) / grain;
    const int64_t chunk = std::max<int64_t>(1, (grains + num_threads - 1) / num_threads) * grain;
    const int64_t parts = (count + chunk - 1) / chunk;
    const auto run_part = [&](int64_t part) { body(part * chunk, std::min((part + 1) * chunk, count)); };
    if (team) {
        keep_error([&] {
            for (int64_t part = team_number; part < parts; part += team->threads) run_part(part);
        });
#pragma omp barrier
        return;
    }
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1) if (parts > 1)
    for (int64_t part = 0; part < parts; ++part) run_part(part);
}

// Calls body() on up to `num_threads` threads at once, which share the work of every parallel_for in it. What a part of that
// has thrown the others find in `team->error` after it; what body throws itself, it must throw on every thread. It is thrown
// again at the end.
template <typename Body>
void run_in_team(int num_threads, const Body& body) {
    Team members = {1, nullptr};
#pragma omp parallel num_threads(num_threads)
    {
        team = &members;
#ifdef _OPENMP
        team_number = omp_get_thread_num();
#pragma omp single
        members.threads = omp_get_num_threads();
#endif
        keep_error(body);
        team = nullptr;
    }
    if (members.error) std::rethrow_exception(members.error);
}

}  // namespace ddim_fast
