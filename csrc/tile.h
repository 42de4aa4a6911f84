// How products are cut: what a kernel file and its host side agree on.
#pragma once

#include <stdint.h>

#include "instruction_set.h"

namespace ddim_fast {

// Columns, such as output channels, whose sums are taken together.
constexpr int64_t kBlock = 64;

// Rows, such as Winograd's tiles, that are multiplied together.
constexpr int64_t kTileGroup = 6;

// Columns, such as output channels, whose weights lie together.
DDIM_FAST_DECLARE_EACH(extern const int64_t strip_columns;)

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// The task number `task` of `runs` * `splits`: rows [begin, end), whole groups but for the last ones (rows beyond those are
// computed, but not read), and blocks [first_block, last_block) of kBlock columns.
struct Part {
    int64_t begin, end, first_block, last_block;
};

struct Division {
    // About `rows_a_task` rows a task. Where those are too few for the threads, tasks are parts of the columns, too: then each
    // thread reads its own weights.
    Division(int64_t rows, int64_t columns, int64_t rows_a_task, int64_t threads)
        : rows(rows), groups(divide_up(rows, kTileGroup)), blocks(divide_up(columns, kBlock)) {
        runs = divide_up(rows, rows_a_task);
        if (runs < threads) splits = blocks < divide_up(threads, runs) ? blocks : divide_up(threads, runs);
        const int64_t even = divide_up(runs * splits, threads) * threads / splits;
        runs = groups < even ? groups : even;
    }

    int64_t tasks() const { return runs * splits; }
    // The most rows that a task has, in whole groups.
    int64_t most_rows() const { return divide_up(groups, runs) * kTileGroup; }
    Part part(int64_t task) const {
        const int64_t run = task / splits, split = task % splits;
        const int64_t first = groups * run / runs * kTileGroup, last = groups * (run + 1) / runs * kTileGroup;
        return {first, last < rows ? last : rows, blocks * split / splits, blocks * (split + 1) / splits};
    }

    int64_t rows, groups, blocks, runs, splits = 1;
};

}  // namespace ddim_fast
