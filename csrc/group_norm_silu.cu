// group_norm_silu on the GPU.
//
// A block takes a few whole groups of one image. It copies their values to shared memory, all in flight at once, adds up
// the mean and then the squared deviations from it, and writes the result: each value is read and written once. Groups
// that do not fit, or are too few to keep the GPU busy, are cut into parts along the positions. The same kernel then runs
// twice: blocks leave the statistics of their parts in a workspace, and blocks that merge them apply the norm.
//
// Every sum is taken in an order that depends on the sizes, the alignment and the GPU alone: no atomics.
#include "group_norm_silu.h"

#include <algorithm>

#include "device.h"

namespace ddim_fast {
namespace {

constexpr int kMaxThreads = 512;

// Both layouts are lines of vectors, a vector being kWidth values that move together and a line the vectors that have
// their channels in common. channels_last: kWidth channels, along the positions. Channels first: a channel, along its
// positions kWidth at a time.
struct Plan {
    int groups;       // of a block; 1 unless channels_last
    int lines;        // of a block
    int parts;        // blocks that share one line
    int part_length;  // vectors in a line of the block; the last part may have fewer
    int64_t length;   // vectors in a line of the image
    int64_t blocks;
    int threads;
    int slab;    // bytes of the values, a multiple of 16
    int shared;  // bytes in all
};

enum class Stage { whole, statistics, apply };

// What the workspace holds for each image, group and part, in this order.
struct Partial {
    double mean;
    double squares;  // the sum of squared deviations from the mean
};

template <typename T, int kWidth, bool kChannelsLast>
class Block {
    using Values = Vector<T, kWidth>;
    static constexpr int kBytes = sizeof(Values);
    static constexpr int kChannels = kChannelsLast ? kWidth : 1;  // of a line

  public:
    __device__ Block(const GroupNormSilu<T>& op, const Plan& plan)
        : op(op), plan(plan), all_channels(op.x_channels + op.skip_channels), group_size(all_channels / op.groups) {
        const int block = blockIdx.x / plan.parts, blocks_an_image = int(op.groups) / plan.groups;
        part = blockIdx.x % plan.parts;
        image = block / blocks_an_image;
        first_group = block % blocks_an_image * plan.groups;
        first_channel = first_group * group_size;
        channels = plan.groups * group_size;
        start = int64_t(part) * plan.part_length;
        length = length_of(part);

        // Neighbouring threads take what are neighbours in memory.
        const int thread = threadIdx.x, across = min(kChannelsLast ? plan.lines : length, plan.threads);
        const int near = thread % across, far = thread / across, rows = plan.threads / across;
        first_line = kChannelsLast ? near : far;
        line_step = kChannelsLast ? across : rows;
        first_vector = kChannelsLast ? far : near;
        vector_step = kChannelsLast ? rows : across;
        if (far >= rows) first_line = plan.lines;  // a thread left over

        slab = static_cast<Values*>(dynamic_shared());
        center = reinterpret_cast<float*>(static_cast<char*>(dynamic_shared()) + plan.slab);
        added = center + channels;
        rest = added + channels;
        gain = rest + channels;
        bias = gain + channels;
        scratch = bias + channels;
    }

    __device__ void run(Stage stage, Partial* workspace) {
        request_values();
        set_numbers(stage != Stage::apply);
        __pipeline_wait_prior(0);  // for this thread's values; no other thread reads them
        __syncthreads();
        if (stage == Stage::apply) {
            merge(workspace);
        } else {
            const double count = values_of(length);
            sum<false>();
            for_each_group([&](int group, double total) {
                for_each_channel(group, [&](int c) { set_center(c, center[c] + total / count); });
            });
            sum<true>();
            for_each_group([&](int group, double total) {
                const int c = group * group_size;
                if (stage == Stage::whole)
                    set_variance(group, total / count);
                else if (threadIdx.x % 32 == 0)
                    partials(workspace, group)[part] = {double(center[c]) + rest[c], total};
            });
        }
        if (stage != Stage::statistics) write();
    }

  private:
    __device__ int length_of(int part) const {
        return static_cast<int>(min(int64_t(plan.part_length), plan.length - int64_t(part) * plan.part_length));
    }

    // Of a group, in that many vectors of each of its lines.
    __device__ double values_of(int64_t vectors) const { return double(group_size) * (kChannelsLast ? vectors : vectors * kWidth); }

    // One of the arrays of images, which has this many channels: where position `p` of channel c is.
    template <typename Pointer>
    __device__ Pointer at(Pointer base, int64_t width, int64_t c, int64_t p) const {
        return base + image * width * op.positions + (kChannelsLast ? p * width + c : c * op.positions + p);
    }

    __device__ const T* input(int64_t c, int64_t p) const {
        return c < op.x_channels ? at(op.x, op.x_channels, c, p) : at(op.skip, op.skip_channels, c - op.x_channels, p);
    }

    // Calls visit(line, its first channel counted from first_channel) for each of this thread's lines.
    template <typename Visit>
    __device__ void for_each_line(const Visit& visit) const {
        for (int line = first_line; line < plan.lines; line += line_step) visit(line, line * kChannels);
    }

    // Calls visit(place in the slab, place in the line) for each of this thread's vectors in a line.
    template <typename Visit>
    __device__ void for_each_vector(int line, const Visit& visit) const {
        for (int i = first_vector; i < length; i += vector_step)
            visit(kChannelsLast ? i * plan.lines + line : line * length + i, i);
    }

    __device__ void request_values() {
        for_each_line([&](int line, int c) {
            const T* p = input(first_channel + c, kChannelsLast ? start : start * kWidth);
            const int64_t step = !kChannelsLast ? kWidth : first_channel + c < op.x_channels ? op.x_channels : op.skip_channels;
            for_each_vector(line, [&](int place, int i) { copy_async<kBytes>(&slab[place], p + i * step); });
        });
        __pipeline_commit();
    }

    // What each channel needs: v = x + added, and y = (v - center) * gain + bias once the statistics are in it. Until then the
    // center is the group's first value: that subtraction loses no digits of values with a large mean and a small spread.
    __device__ void set_numbers(bool with_center) {
        for (int k = threadIdx.x; k < channels; k += plan.threads) {
            const int64_t c = first_channel + k, pivot = first_channel + k / group_size * group_size;
            const auto number = [&](const float* p, int64_t channel) { return p ? p[image * all_channels + channel] : 0.0f; };
            const float scale = 1.0f + number(op.scale, c);
            // Later x may have been written to, as out.
            const float* shifts = op.pre_shift ? op.pre_shift + image * op.pre_shift_stride : nullptr;
            if (with_center) center[k] = to_float(*input(pivot, 0)) + (shifts ? shifts[pivot] : 0.0f);
            added[k] = shifts ? shifts[c] : 0.0f;
            gain[k] = op.weight[c] * scale;
            bias[k] = op.bias[c] * scale + number(op.shift, c);
        }
    }

    // Sums over this thread's values, of d = v - center or, when kSquares, of its square, left in scratch: one for each channel
    // of a vector where the block has several groups, and one in all otherwise.
    template <bool kSquares>
    __device__ void sum() {
        float total[kWidth] = {};
        for_each_line([&](int line, int c) {
            float line_added[kChannels], line_center[kChannels];
            copy_numbers(line_added, added + c);
            copy_numbers(line_center, center + c);
            for_each_vector(line, [&](int place, int) {
                Values v;
                copy<kBytes>(&v, &slab[place]);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    const int k = kChannelsLast ? j : 0;
                    const float d = to_float(v.value[j]) + line_added[k] - line_center[k];
                    total[j] = kSquares ? fmaf(d, d, total[j]) : total[j] + d;
                }
            });
        });
        if (plan.groups > 1) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) scratch[j * scratch_step() + threadIdx.x] = total[j];
        } else {
#pragma unroll
            for (int j = 1; j < kWidth; ++j) total[0] += total[j];
            scratch[threadIdx.x] = total[0];
        }
        __syncthreads();
    }

    // One more than there are threads keeps the channels of a vector in different banks.
    __device__ int scratch_step() const { return plan.threads + 1; }

    // Calls visit(group, the sum of its share of scratch) in all lanes of one warp for each of the block's groups.
    template <typename Visit>
    __device__ void for_each_group(const Visit& visit) {
        // Several groups: each thread has one line, and `rows` threads have the same.
        const bool several = plan.groups > 1;
        const int lines = several ? plan.lines : 1, rows = plan.threads / lines, columns = several ? group_size : 1;
        const int lane = threadIdx.x % 32, across = min(columns, 32), down = 32 / across;
        for (int group = threadIdx.x / 32; group < plan.groups; group += plan.threads / 32) {
            float total = 0;  // of a few; large sums are fp64
            for (int column = lane % across; column < columns && lane < across * down; column += across) {
                const int c = group * columns + column;
                const float* from = scratch + c % kWidth * scratch_step() + c / kWidth;
                for (int row = lane / across; row < rows; row += down) total += from[row * lines];
            }
            visit(group, warp_sum<double>(total));
        }
        __syncthreads();
    }

    // Calls visit(channel) for a group's channels, shared among the lanes of a warp.
    template <typename Visit>
    __device__ void for_each_channel(int group, const Visit& visit) const {
        for (int c = threadIdx.x % 32; c < group_size; c += 32) visit(group * group_size + c);
    }

    // In twice the digits of fp32: where values have a large mean and a small spread, the rest counts.
    __device__ void set_center(int c, double value) {
        center[c] = float(value);
        rest[c] = float(value - center[c]);
    }

    __device__ void set_variance(int group, double variance) {
        const double inverse = 1.0 / sqrt(variance + op.eps);
        for_each_channel(group, [&](int c) {
            gain[c] = float(gain[c] * inverse);
            bias[c] -= rest[c] * gain[c];
        });
    }

    __device__ Partial* partials(Partial* workspace, int group) const {
        return workspace + (image * op.groups + first_group + group) * plan.parts;
    }

    // Chan, Golub and LeVeque 1979, for all parts at once.
    __device__ void merge(Partial* workspace) {
        const double count = values_of(plan.length);
        for (int group = threadIdx.x / 32; group < plan.groups; group += plan.threads / 32) {
            const Partial* of_part = partials(workspace, group);
            const auto sum_of_parts = [&](const auto& term) {
                double total = 0;
                for (int p = threadIdx.x % 32; p < plan.parts; p += 32) total += term(of_part[p], values_of(length_of(p)));
                return warp_sum(total);
            };
            const double mean = sum_of_parts([](Partial p, double n) { return n * p.mean; }) / count;
            const double squares = sum_of_parts([&](Partial p, double n) {
                const double difference = p.mean - mean;
                return p.squares + n * difference * difference;
            });
            for_each_channel(group, [&](int c) { set_center(c, mean); });
            set_variance(group, squares / count);
        }
        __syncthreads();
    }

    __device__ void write() const {
        for_each_line([&](int line, int c) {
            float line_added[kChannels], line_center[kChannels], line_gain[kChannels], line_bias[kChannels];
            copy_numbers(line_added, added + c);
            copy_numbers(line_center, center + c);
            copy_numbers(line_gain, gain + c);
            copy_numbers(line_bias, bias + c);
            const int64_t position = kChannelsLast ? start : start * kWidth, step = kChannelsLast ? all_channels : kWidth;
            T* out = at(op.out, all_channels, first_channel + c, position);
            const T* residual = op.residual ? at(op.residual, all_channels, first_channel + c, position) : nullptr;
            for_each_vector(line, [&](int place, int i) {
                Values v, r;
                copy<kBytes>(&v, &slab[place]);
                if (residual) copy<kBytes>(&r, residual + i * step);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    const int k = kChannelsLast ? j : 0;
                    const float d = to_float(v.value[j]) + line_added[k] - line_center[k];
                    float y = fmaf(d, line_gain[k], line_bias[k]);
                    if (op.silu) y = __fdividef(y, 1.0f + __expf(-y));
                    if (residual) y += to_float(r.value[j]);
                    v.value[j] = from_float<T>(y);
                }
                write_global<kBytes>(out + i * step, &v);
            });
        });
    }

    __device__ static void copy_numbers(float (&to)[kChannels], const float* from) {
#pragma unroll
        for (int k = 0; k < kChannels; ++k) to[k] = from[k];
    }

    const GroupNormSilu<T>& op;
    const Plan& plan;
    const int64_t all_channels;
    const int group_size;
    int64_t image, start;
    int part, first_group, first_channel, channels, length;
    int first_line, line_step, first_vector, vector_step;
    Values* slab;
    float *center, *added, *rest, *gain, *bias, *scratch;
};

template <typename T, int kWidth, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, 1)
    group_norm_silu_kernel(GroupNormSilu<T> op, Plan plan, Stage stage, Partial* workspace) {
    Block<T, kWidth, kChannelsLast>(op, plan).run(stage, workspace);
}

// What a block at least takes before a line is cut: less would not pay for a second kernel.
constexpr int64_t kPartBytes = 32 << 10;

// Rows of a channels_last block: shorter ones waste part of what memory delivers at once.
constexpr int64_t kRowBytes = 64;
constexpr int64_t kMaxRowVectors = 128;

// So that one vector of each of a group's channels, and the channel's numbers, fit into the shared memory of any GPU.
constexpr int64_t kMaxGroupSize = 2048;

struct Device {
    int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
    int64_t shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);  // bytes a block may have
};

class Planner {
  public:
    Planner(const GroupNormSilu<void>& op, int value_bytes, int width)
        : op(op), value_bytes(value_bytes), width(width), group_size((op.x_channels + op.skip_channels) / op.groups) {
        if (group_size > kMaxGroupSize)
            throw std::invalid_argument("a group has " + std::to_string(group_size) + " channels, but may have at most " +
                                        std::to_string(kMaxGroupSize));
        length = op.channels_last ? op.positions : op.positions / width;
        groups = choose_groups();
    }

    // Whether every vector lies in one input and in one block.
    bool is_possible() const {
        const auto whole = [this](int64_t values) { return values % width == 0; };
        return groups > 0 && (op.channels_last ? whole(op.x_channels) && whole(op.skip_channels) : whole(op.positions));
    }

    Plan plan() const {
        const bool fits = shared(groups, length) <= device.shared;
        const bool idle = 2 * blocks(groups) < device.multiprocessors && slab(groups, length) > kPartBytes;
        const int64_t part_length = fits && !idle ? length : std::clamp<int64_t>(kPartBytes / vector_bytes(groups), 1, length);
        const int64_t parts = (length + part_length - 1) / part_length;
        if (blocks(groups) * parts > INT32_MAX) throw std::invalid_argument("x is too large for one launch");
        return {int(groups), int(lines(groups)), int(parts), int(part_length), length, blocks(groups) * parts,
                int(threads(groups, part_length)), int(slab(groups, part_length)), int(shared(groups, part_length))};
    }

  private:
    // The fewest that make whole vectors; then more, for longer rows, as long as the lines stay whole and every
    // multiprocessor has work. 0 where there is no such number.
    int64_t choose_groups() const {
        if (!op.channels_last) return 1;
        int64_t chosen = 0;
        for (int64_t g = 1; g <= op.groups; ++g) {
            if (op.groups % g != 0 || g * group_size % width != 0) continue;
            if (g > 1 && lines(g) > kMaxRowVectors) break;
            if (chosen > 0) {
                const bool cuts = shared(g, length) > device.shared && shared(chosen, length) <= device.shared;
                if (vector_bytes(chosen) >= kRowBytes || blocks(g) < device.multiprocessors || cuts) break;
            }
            chosen = g;
        }
        return chosen;
    }

    int64_t blocks(int64_t g) const { return op.images * (op.groups / g); }
    int64_t lines(int64_t g) const { return g * group_size / (op.channels_last ? width : 1); }
    int64_t vector_bytes(int64_t g) const { return lines(g) * width * value_bytes; }  // one vector of each line
    int64_t slab(int64_t g, int64_t vectors) const { return (vector_bytes(g) * vectors + 15) / 16 * 16; }

    // Some sixteen vectors each: what is under way is in shared memory, so that few threads, and registers, do. A block of
    // several groups has a thread for each line.
    int64_t threads(int64_t g, int64_t vectors) const {
        const int64_t wanted = std::max(lines(g) * vectors / 16, g > 1 ? lines(g) : 0);
        return std::clamp<int64_t>((wanted + 31) / 32 * 32, 64, kMaxThreads);
    }

    // The slab, five numbers a channel, and scratch.
    int64_t shared(int64_t g, int64_t vectors) const {
        const int64_t scratch = g > 1 ? (threads(g, vectors) + 1) * width : threads(g, vectors);
        return slab(g, vectors) + 4 * (5 * g * group_size + scratch);
    }

    const GroupNormSilu<void>& op;
    const Device device;
    const int64_t value_bytes, width, group_size;
    int64_t length, groups;
};

template <typename T, int kWidth>
void run(const GroupNormSilu<void>& op, const Plan& plan, void* workspace, void* stream) {
    const GroupNormSilu<T> typed{static_cast<const T*>(op.x), static_cast<const T*>(op.skip), static_cast<const T*>(op.residual),
                                 static_cast<T*>(op.out), op.weight, op.bias, op.pre_shift, op.scale, op.shift, op.images,
                                 op.x_channels, op.skip_channels, op.positions, op.groups, op.pre_shift_stride, op.eps, op.silu,
                                 op.channels_last};
    const char* name = "group_norm_silu_cuda";
    const auto kernel = op.channels_last ? group_norm_silu_kernel<T, kWidth, true> : group_norm_silu_kernel<T, kWidth, false>;
    constexpr int kWithoutAsking = 48 << 10;
    if (plan.shared > kWithoutAsking)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared), name);
    const auto run_stage = [&](Stage stage) {
        launch(name, kernel, plan.blocks, plan.threads, plan.shared, stream, typed, plan, stage, static_cast<Partial*>(workspace));
    };
    if (plan.parts == 1) {
        run_stage(Stage::whole);
    } else {
        run_stage(Stage::statistics);
        run_stage(Stage::apply);
    }
}

template <typename T>
void run_fastest(const GroupNormSilu<void>& op, void* workspace, void* stream) {
    constexpr int kWidth = 16 / sizeof(T);
    bool aligned = true;
    for (const void* pointer : {op.x, op.skip, op.residual, static_cast<const void*>(op.out)})
        aligned = aligned && is_aligned(pointer, 16);
    const Planner wide(op, sizeof(T), kWidth), single(op, sizeof(T), 1);
    const bool is_wide = aligned && wide.is_possible();
    const Plan plan = (is_wide ? wide : single).plan();
    if (plan.parts > 1 && workspace == nullptr) throw std::invalid_argument("workspace_ptr is a null pointer");
    (is_wide ? run<T, kWidth> : run<T, 1>)(op, plan, workspace, stream);
}

}  // namespace

int64_t group_norm_silu_cuda_workspace(const GroupNormSilu<void>& op, Dtype dtype) {
    if (op.images * op.positions == 0) return 0;
    const Planner wide(op, size_of(dtype), 16 / size_of(dtype)), single(op, size_of(dtype), 1);
    int64_t parts = 1;
    for (const Planner& planner : {wide, single})
        if (planner.is_possible()) parts = std::max<int64_t>(parts, planner.plan().parts);
    return parts == 1 ? 0 : op.images * op.groups * parts * int64_t(sizeof(Partial));
}

void group_norm_silu_cuda(const GroupNormSilu<void>& op, Dtype dtype, void* workspace, void* stream) {
    if (op.images * op.positions == 0) return;  // a grid of no blocks is a launch error
    switch (dtype) {
        case Dtype::fp32: return run_fastest<float>(op, workspace, stream);
        case Dtype::bf16: return run_fastest<__nv_bfloat16>(op, workspace, stream);
        case Dtype::fp16: return run_fastest<__half>(op, workspace, stream);
    }
}

}  // namespace ddim_fast
