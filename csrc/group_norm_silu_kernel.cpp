// The norm of one image's channels. Compiled once for each instruction set: see instruction_set.h.
#include "group_norm_silu_kernel.h"

#include "vector.h"

namespace ddim_fast::DDIM_FAST_ISA {
namespace {

// Rows summed in fp32 before the sum moves to fp64, so that long sums lose no digits.
constexpr int64_t kRows = 128;

// Channels first: with no more rows than this in a channel, the start of a loop over them would take longer than the loop.
constexpr int64_t kFewRows = 8;

// Both layouts are rows of lanes. channels_last: a row a position, a lane a channel. Channels first: one channel at a
// time, its positions cut into rows of lanes.
//
// What each lane needs, all sums being over d = v - pivot with the group's first element as pivot. Where values have a
// large mean and a small spread, that subtraction is exact and the mean of d small, so no digits are lost.
struct LaneNumbers {
    Vector added;  // pre_shift: d = (x + added) - pivot
    Vector pivot;
    Vector mean;  // of d
    Vector gain;  // y = (d - mean) * gain + bias
    Vector bias;
};

template <typename T, bool Full>
DDIM_FAST_INLINE Vector load_row(const T* p, int64_t lanes) {
    return Full ? load(p) : load_some(p, lanes);
}

// Adds to `total` the sums over `rows` rows, `stride` elements apart, of d or, when Squares, of (d - mean)^2.
template <bool Squares, bool Full, typename T>
DDIM_FAST_INLINE void sum_rows(const T* p, int64_t rows, int64_t stride, int64_t lanes, const LaneNumbers& number,
                               WideVector& total) {
    const Vector added = number.added, pivot = number.pivot, mean = number.mean;
    const auto term = [&](int64_t row) __attribute__((always_inline)) {
        const Vector d = load_row<T, Full>(p + row * stride, lanes) + added - pivot;
        return Squares ? (d - mean) * (d - mean) : d;
    };
    int64_t row = 0;
    while (row < rows) {
        const int64_t end = smaller(row + kRows, rows);
        Vector a = {}, b = {}, c = {}, d = {};  // four chains, so that additions need not wait for each other
        for (; row + 4 <= end; row += 4) a += term(row), b += term(row + 1), c += term(row + 2), d += term(row + 3);
        for (; row < end; ++row) a += term(row);
        add(total, (a + b) + (c + d));
    }
}

template <bool Silu, bool Full, typename T>
DDIM_FAST_INLINE void write_rows(const T* p, int64_t stride, T* out, const T* residual, int64_t out_stride, int64_t rows,
                                 int64_t lanes, const LaneNumbers& number) {
    const LaneNumbers n = number;
    for (int64_t row = 0; row < rows; ++row) {
        const Vector d = load_row<T, Full>(p + row * stride, lanes) + n.added - n.pivot;
        Vector y = (d - n.mean) * n.gain + n.bias;
        if (Silu) y = silu(y);
        if (residual) y += load_row<T, Full>(residual + row * out_stride, lanes);
        Full ? store(out + row * out_stride, y) : store_some(out + row * out_stride, y, lanes);
    }
}

// The norm of the channels [first, last) of one image, which are whole groups.
template <typename T>
class Task {
  public:
    // scratch: a double and five floats for each channel of the largest run, and for kLanes more.
    Task(const GroupNormSilu<T>& op, int64_t width, double* scratch)
        : op(op), channels(op.x_channels + op.skip_channels), group_size(channels / op.groups), sum(scratch) {
        float* numbers = reinterpret_cast<float*>(scratch + width);
        float** const rows[] = {&added, &pivot, &mean, &gain, &bias};
        for (float** row : rows) *row = numbers, numbers += width;
        memset(added, 0, width * sizeof(float));
    }

    void run(int64_t image_, int64_t first_, int64_t last_) {
        image = image_, first = first_, last = last_;
        set_pivots();
        sum_channels<false>();
        const double count = static_cast<double>(group_size) * op.positions;
        for_each_group([&](int64_t begin, int64_t end, double total) __attribute__((always_inline)) {
            for (int64_t k = begin; k < end; ++k) mean[k] = static_cast<float>(total / count);
        });
        sum_channels<true>();
        for_each_group([&](int64_t begin, int64_t end, double total) __attribute__((always_inline)) {
            const float inverse = static_cast<float>(1.0 / __builtin_sqrt(total / count + op.eps));
            for (int64_t k = begin; k < end; ++k) {
                const int64_t channel = first + k, number = image * channels + channel;
                const float scale = op.scale ? 1.0f + op.scale[number] : 1.0f;
                gain[k] = inverse * op.weight[channel] * scale;
                bias[k] = op.bias[channel] * scale + (op.shift ? op.shift[number] : 0.0f);
            }
        });
        op.silu ? write<true>() : write<false>();
    }

  private:
    // Where channel c of the image starts, in x or in skip.
    DDIM_FAST_INLINE const T* input(int64_t c) const {
        return c < op.x_channels ? start(op.x, op.x_channels, c) : start(op.skip, op.skip_channels, c - op.x_channels);
    }

    template <typename Pointer>
    DDIM_FAST_INLINE Pointer start(Pointer base, int64_t width, int64_t c) const {
        return base + image * width * op.positions + (op.channels_last ? c : c * op.positions);
    }

    // Channels first: how many channels from c on, and before `end`, follow each other in memory and have the same numbers
    // in the sums.
    DDIM_FAST_INLINE int64_t alike(int64_t c, int64_t end) const {
        if (op.pre_shift) return 1;
        return c < op.x_channels ? smaller(end, op.x_channels) - c : end - c;
    }

    DDIM_FAST_INLINE void set_pivots() {
        for (int64_t c = first; op.pre_shift && c < last; ++c) added[c - first] = op.pre_shift[image * op.pre_shift_stride + c];
        for (int64_t c = first; c < last; c += group_size) {
            const float value = to_float(*input(c)) + added[c - first];
            for (int64_t k = c; k < c + group_size; ++k) pivot[k - first] = value;
        }
    }

    // Calls visit(begin, end, the sum over the channels) for each group, its channels counted from `first`.
    template <typename Visit>
    DDIM_FAST_INLINE void for_each_group(const Visit& visit) const {
        for (int64_t begin = 0; begin < last - first; begin += group_size) {
            double total = 0;
            for (int64_t k = begin; k < begin + group_size; ++k) total += sum[k];
            visit(begin, begin + group_size, total);
        }
    }

    // channels_last: calls visit(k, lanes, stride) for each strip of up to kLanes channels k.. that lie in one input.
    template <typename Visit>
    DDIM_FAST_INLINE void for_each_strip(const Visit& visit) const {
        const int64_t border = op.x_channels < first ? first : smaller(op.x_channels, last);
        for (int64_t c = first; c < border; c += kLanes) visit(c - first, smaller(kLanes, border - c), op.x_channels);
        for (int64_t c = border; c < last; c += kLanes) visit(c - first, smaller(kLanes, last - c), op.skip_channels);
    }

    DDIM_FAST_INLINE LaneNumbers channel_lanes(int64_t k) const {
        return {load(&added[k]), load(&pivot[k]), load(&mean[k]), load(&gain[k]), load(&bias[k])};
    }

    DDIM_FAST_INLINE LaneNumbers one_channel(int64_t k) const {
        return {broadcast(added[k]), broadcast(pivot[k]), broadcast(mean[k]), broadcast(gain[k]), broadcast(bias[k])};
    }

    // sum <- over the positions of the channels, d or, when Squares, (d - mean)^2; what counts is the sum over a group.
    template <bool Squares>
    DDIM_FAST_INLINE void sum_channels() {
        if (op.channels_last) {
            for_each_strip([&](int64_t k, int64_t lanes, int64_t stride) __attribute__((always_inline)) {
                const T* p = input(first + k);
                const LaneNumbers numbers = channel_lanes(k);
                WideVector total = {};
                lanes == kLanes ? sum_rows<Squares, true>(p, op.positions, stride, lanes, numbers, total)
                                : sum_rows<Squares, false>(p, op.positions, stride, lanes, numbers, total);
                store(sum + k, total);  // lanes beyond the strip are written again by the next one, or never read
            });
            return;
        }
        // A group is added up lane by lane and the lanes only then: its sum stands in the place of its first channel.
        memset(sum, 0, (last - first) * sizeof(double));
        for (int64_t begin = 0; begin < last - first; begin += group_size) {
            WideVector total = {};
            for (int64_t k = begin, run; k < begin + group_size; k += run) {
                run = alike(first + k, first + begin + group_size);
                const T* p = input(first + k);
                const LaneNumbers numbers = one_channel(k);
                const int64_t rows = run * op.positions / kLanes, rest = run * op.positions % kLanes;
                sum_rows<Squares, true>(p, rows, kLanes, kLanes, numbers, total);
                if (rest) {
                    const Vector d = load_some(p + rows * kLanes, rest) + numbers.added - numbers.pivot;
                    const Vector term = Squares ? (d - numbers.mean) * (d - numbers.mean) : d;
                    add(total, first_lanes(term, rest));
                }
            }
            sum[begin] = add_lanes(total);
        }
    }

    template <bool Silu>
    DDIM_FAST_INLINE void write() const {
        if (op.channels_last) {
            for_each_strip([&](int64_t k, int64_t lanes, int64_t stride) __attribute__((always_inline)) {
                const T* p = input(first + k);
                T* out = start(op.out, channels, first + k);
                const T* residual = op.residual ? start(op.residual, channels, first + k) : nullptr;
                const LaneNumbers numbers = channel_lanes(k);
                if (lanes == kLanes)
                    write_rows<Silu, true>(p, stride, out, residual, channels, op.positions, lanes, numbers);
                else
                    write_rows<Silu, false>(p, stride, out, residual, channels, op.positions, lanes, numbers);
            });
            return;
        }
        const int64_t rows = op.positions / kLanes, rest = op.positions % kLanes;
        if (rest == 0 && rows <= kFewRows) {
            write_channels<Silu>(rows);
            return;
        }
        for (int64_t k = 0; k < last - first; ++k) {
            const T* p = input(first + k);
            T* out = start(op.out, channels, first + k);
            const T* residual = op.residual ? start(op.residual, channels, first + k) : nullptr;
            const int64_t done = rows * kLanes;
            const LaneNumbers numbers = one_channel(k);
            write_rows<Silu, true>(p, kLanes, out, residual, kLanes, rows, kLanes, numbers);
            write_rows<Silu, false>(p + done, 0, out + done, residual ? residual + done : nullptr, 0, 1, rest, numbers);
        }
    }

    // Channels first, whole rows: one loop over those of all channels.
    template <bool Silu>
    void write_channels(int64_t rows_a_channel) const {
        const int64_t border = op.x_channels < first ? first : smaller(op.x_channels, last);
        for (int64_t begin = first, end = border; begin < last; begin = end, end = last) {
            const T* p = input(begin);
            T* out = start(op.out, channels, begin);
            const T* residual = op.residual ? start(op.residual, channels, begin) : nullptr;
            int64_t k = begin - first, left = rows_a_channel;
            for (int64_t row = 0; row < (end - begin) * rows_a_channel; ++row) {
                write_rows<Silu, true>(p + row * kLanes, 0, out + row * kLanes, residual ? residual + row * kLanes : nullptr, 0, 1,
                                                 kLanes, one_channel(k));
                if (--left == 0) left = rows_a_channel, ++k;
            }
        }
    }

    const GroupNormSilu<T>& op;
    const int64_t channels, group_size;
    int64_t image = 0, first = 0, last = 0;
    double* sum;  // a number a channel from `first`, and room for a last, partial vector, as in the other rows
    float *added, *pivot, *mean, *gain, *bias;
};

template <typename T>
DDIM_FAST_INLINE void run(const GroupNormSilu<T>& op, const Cut& cut, int64_t begin, int64_t end, double* scratch) {
    Task<T> task(op, cut.width, scratch);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % cut.tasks_an_image * cut.channels;
        task.run(i / cut.tasks_an_image, first, smaller(first + cut.channels, op.x_channels + op.skip_channels));
    }
}

}  // namespace

#ifndef __AVX512BF16__
__attribute__((flatten)) void run_tasks(const GroupNormSilu<float>& op, const Cut& cut, int64_t begin, int64_t end,
                                        double* scratch) {
    run(op, cut, begin, end, scratch);
}
#endif

__attribute__((flatten)) void run_tasks(const GroupNormSilu<bfloat16>& op, const Cut& cut, int64_t begin, int64_t end,
                                        double* scratch) {
    run(op, cut, begin, end, scratch);
}

}  // namespace ddim_fast::DDIM_FAST_ISA
