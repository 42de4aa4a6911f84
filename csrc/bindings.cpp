// The Python module ddim_fast._native. It takes addresses, not tensors, so it fits every version of torch and serves
// numpy and ONNX Runtime as well; whoever calls it keeps the arrays alive and of the stated size.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "conv3x3.h"
#include "ddim_step.h"
#include "group_norm_silu.h"
#include "instruction_set.h"
#include "plan_bindings.h"

namespace py = pybind11;

namespace ddim_fast {
namespace {

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value >= least && value <= most) return;
    throw py::value_error(std::string(name) + " is " + std::to_string(value) + ", but must be from " + std::to_string(least) +
                          " to " + std::to_string(most));
}

// An address of values of `size` bytes; 0 is a null pointer.
template <typename T>
T* to_pointer(uintptr_t address, const char* name, size_t size = sizeof(T)) {
    if (address % size == 0) return reinterpret_cast<T*>(address);
    throw py::value_error(std::string(name) + " is not a multiple of its values' " + std::to_string(size) + " bytes");
}

void require(uintptr_t address, const char* name) {
    if (address == 0) throw py::value_error(std::string(name) + " is a null pointer");
}

// The arguments that a DDIM step has on every device.
struct DdimArguments {
    uintptr_t sample, model_output, noise, out;
    int64_t numel;
    float clip;
    uintptr_t unconditional;
    float guidance;
    uintptr_t seeds;
    int64_t image_numel, step;
    std::array<int, 3> dtypes;
};

// Without coefficients.
DdimStep check_ddim_step(const DdimArguments& a) {
    check_range("numel", a.numel, 0, INT64_MAX);
    if (a.numel > 0) {  // empty tensors have null pointers
        require(a.sample, "sample_ptr");
        require(a.model_output, "model_output_ptr");
        require(a.out, "out_ptr");
    }
    for (const int code : a.dtypes) check_range("dtypes", code, 0, 2);
    const auto dtype = [&a](int i) { return static_cast<Dtype>(a.dtypes[i]); };
    const auto input = [&](uintptr_t address, const char* name, int i) {
        if (address != 0 && address == a.out && size_of(dtype(i)) != size_of(dtype(2)))
            throw py::value_error(std::string("out_ptr is ") + name + ", but their dtypes differ in size");
        return to_pointer<const void>(address, name, size_of(dtype(i)));
    };
    if (!(a.clip > 0))  // true for NaN
        throw py::value_error("clip is " + std::to_string(a.clip) + ", but must be positive (inf: no clipping)");
    if (!std::isfinite(a.guidance)) throw py::value_error("guidance is " + std::to_string(a.guidance) + ", but must be finite");
    check_range("step", a.step, 0, UINT32_MAX);
    if (a.seeds != 0) {
        if (a.noise != 0) throw py::value_error("noise_ptr and seeds_ptr cannot both be given");
        check_range("image_numel", a.image_numel, a.numel > 0, int64_t(1) << 34);
        if (a.numel > 0 && a.numel % a.image_numel != 0)
            throw py::value_error("image_numel is " + std::to_string(a.image_numel) + ", but must divide numel, which is " +
                                  std::to_string(a.numel));
    }
    DdimStep op = {};
    op.sample = input(a.sample, "sample_ptr", 0);
    op.model_output = input(a.model_output, "model_output_ptr", 1);
    op.unconditional = input(a.unconditional, "unconditional_ptr", 1);
    op.noise = input(a.noise, "noise_ptr", 0);
    op.seeds = to_pointer<const int64_t>(a.seeds, "seeds_ptr");
    op.out = to_pointer<void>(a.out, "out_ptr", size_of(dtype(2)));
    op.numel = a.numel;
    op.image_numel = a.image_numel;
    op.sample_dtype = dtype(0);
    op.output_dtype = dtype(1);
    op.out_dtype = dtype(2);
    op.clip = a.clip;
    op.guidance = a.guidance;
    op.step = static_cast<uint32_t>(a.step);
    return op;
}

DdimCoefficients check_coefficients(const std::vector<float>& c) {
    if (c.size() != 7) throw py::value_error("coefficients has " + std::to_string(c.size()) + " values instead of 7");
    return {c[0], c[1], c[2], c[3], c[4], c[5], c[6]};
}

void ddim_step_binding(uintptr_t sample, uintptr_t model_output, uintptr_t noise, uintptr_t out, int64_t numel,
                       const std::vector<float>& coefficients, float clip, int num_threads, uintptr_t unconditional,
                       float guidance, uintptr_t seeds, int64_t image_numel, int64_t step, const std::array<int, 3>& dtypes) {
    DdimStep op = check_ddim_step(
        {sample, model_output, noise, out, numel, clip, unconditional, guidance, seeds, image_numel, step, dtypes});
    op.coefficients = check_coefficients(coefficients);
    for (const int code : dtypes)
        if (static_cast<Dtype>(code) == Dtype::fp16) throw py::value_error("dtypes: there is no fp16 on the CPU");
    check_range("num_threads", num_threads, 1, INT32_MAX);
    ddim_step(op, num_threads);
}

#ifdef DDIM_FAST_WITH_CUDA
void ddim_step_cuda_binding(uintptr_t sample, uintptr_t model_output, uintptr_t noise, uintptr_t out, int64_t numel,
                            const std::vector<float>& coefficients, float clip, uintptr_t stream, uintptr_t unconditional,
                            float guidance, uintptr_t seeds, int64_t image_numel, int64_t step, const std::array<int, 3>& dtypes,
                            uintptr_t table, int64_t table_rows, uintptr_t index) {
    DdimStep op = check_ddim_step(
        {sample, model_output, noise, out, numel, clip, unconditional, guidance, seeds, image_numel, step, dtypes});
    if (table == 0) {
        op.coefficients = check_coefficients(coefficients);
    } else {
        check_range("table_rows", table_rows, 1, INT64_MAX);
        require(index, "index_ptr");
    }
    const auto* row = reinterpret_cast<const DdimCoefficients*>(to_pointer<const float>(table, "table_ptr"));
    ddim_step_cuda(op, {row, table_rows, to_pointer<const int64_t>(index, "index_ptr")}, reinterpret_cast<void*>(stream));
}
#endif

// The addresses of x, skip, residual, out, weight, bias, pre_shift, scale and shift; 0 where there is none.
using GroupNormPointers = std::array<uintptr_t, 9>;
// The numbers of images, x's channels, skip's channels, positions and groups.
using GroupNormSizes = std::array<int64_t, 5>;

template <typename T>
GroupNormSilu<T> make_group_norm_silu(const GroupNormPointers& pointers, const GroupNormSizes& sizes,
                                      std::optional<int64_t> stride, float eps, bool silu, bool channels_last) {
    const auto [x, skip, residual, out, weight, bias, pre_shift, scale, shift] = pointers;
    const auto [images, x_channels, skip_channels, positions, groups] = sizes;
    const auto values = [](uintptr_t address) { return reinterpret_cast<const T*>(address); };
    const auto numbers = [](uintptr_t address) { return reinterpret_cast<const float*>(address); };
    GroupNormSilu<T> op = {};
    op.x = values(x);
    op.skip = values(skip);
    op.residual = values(residual);
    op.out = reinterpret_cast<T*>(out);
    op.weight = numbers(weight);
    op.bias = numbers(bias);
    op.pre_shift = numbers(pre_shift);
    op.scale = numbers(scale);
    op.shift = numbers(shift);
    op.images = images;
    op.x_channels = x_channels;
    op.skip_channels = skip_channels;
    op.positions = positions;
    op.groups = groups;
    op.pre_shift_stride = stride.value_or(x_channels + skip_channels);
    op.eps = eps;
    op.silu = silu;
    op.channels_last = channels_last;
    return op;
}

void check_sizes(const GroupNormSizes& sizes) {
    const auto [images, x_channels, skip_channels, positions, groups] = sizes;
    if (images < 0 || positions < 0) throw py::value_error("images and positions cannot be negative");
    if (x_channels < 1 || skip_channels < 0) throw py::value_error("x_channels must be at least 1, skip_channels at least 0");
    if (groups < 1 || (x_channels + skip_channels) % groups != 0)
        throw py::value_error("groups is " + std::to_string(groups) + ", but must divide the " +
                              std::to_string(x_channels + skip_channels) + " channels");
}

// `value_bytes`: of x, skip, residual and out.
void check_group_norm_silu(const GroupNormPointers& pointers, const GroupNormSizes& sizes, float eps, int value_bytes) {
    check_sizes(sizes);
    if (!(eps >= 0)) throw py::value_error("eps cannot be negative");
    const auto [images, x_channels, skip_channels, positions, groups] = sizes;
    if (images * positions == 0) return;
    const auto [x, skip, residual, out, weight, bias, pre_shift, scale, shift] = pointers;
    if (x == 0 || out == 0 || weight == 0 || bias == 0)
        throw py::value_error("x, out, weight and bias cannot be null pointers");
    if ((skip == 0) != (skip_channels == 0)) throw py::value_error("skip_channels does not fit skip");
    const char* names[] = {"x", "skip", "residual", "out", "weight", "bias", "pre_shift", "scale", "shift"};
    for (int i = 0; i < 9; ++i) to_pointer<void>(pointers[i], names[i], i < 4 ? value_bytes : sizeof(float));
}

void group_norm_silu_binding(const GroupNormPointers& pointers, const GroupNormSizes& sizes, float eps, bool silu,
                             bool channels_last, bool bf16, int num_threads, std::optional<int64_t> stride) {
    check_group_norm_silu(pointers, sizes, eps, size_of(bf16 ? Dtype::bf16 : Dtype::fp32));
    check_range("num_threads", num_threads, 1, INT32_MAX);
    if (bf16)
        group_norm_silu(make_group_norm_silu<bfloat16>(pointers, sizes, stride, eps, silu, channels_last), num_threads);
    else
        group_norm_silu(make_group_norm_silu<float>(pointers, sizes, stride, eps, silu, channels_last), num_threads);
}

#ifdef DDIM_FAST_WITH_CUDA
void group_norm_silu_cuda_binding(const GroupNormPointers& pointers, const GroupNormSizes& sizes, float eps, bool silu,
                                  bool channels_last, int dtype, uintptr_t workspace, uintptr_t stream,
                                  std::optional<int64_t> stride) {
    check_range("dtype", dtype, 0, 2);
    check_group_norm_silu(pointers, sizes, eps, size_of(static_cast<Dtype>(dtype)));
    group_norm_silu_cuda(make_group_norm_silu<void>(pointers, sizes, stride, eps, silu, channels_last),
                         static_cast<Dtype>(dtype), to_pointer<void>(workspace, "workspace_ptr", sizeof(double)), reinterpret_cast<void*>(stream));
}

int64_t group_norm_silu_cuda_workspace_binding(const GroupNormSizes& sizes, bool channels_last, int dtype) {
    check_range("dtype", dtype, 0, 2);
    check_sizes(sizes);
    return group_norm_silu_cuda_workspace(make_group_norm_silu<void>({}, sizes, {}, 0, false, channels_last),
                                          static_cast<Dtype>(dtype));
}
#endif

// The addresses of x, weight, bias, residual and out; 0 where there is none.
using ConvPointers = std::array<uintptr_t, 5>;
// The addresses of steps, units and start: see Int8Scales.
using ScalePointers = std::array<uintptr_t, 3>;
// The numbers of images, rows, columns, input channels and output channels.
using ConvSizes = std::array<int64_t, 5>;

void check_channels(int64_t out_channels, int64_t in_channels) {
    for (const int64_t channels : {out_channels, in_channels})
        if (channels < 1 || channels % kConv3x3Channels != 0)
            throw py::value_error("conv3x3 takes channels in multiples of " + std::to_string(kConv3x3Channels) + ", not " +
                                  std::to_string(channels));
}

void check_tile(int tile, bool fits) {
    if (tile == 2 || (tile == 4 && fits)) return;
    throw py::value_error("tile is " + std::to_string(tile) + ", but must be 2, or 4 in fp32 without upsample");
}

template <typename T, typename W>
void run_conv3x3(const ConvPointers& pointers, const ConvSizes& sizes, bool upsample, int tile, int num_threads,
                 const ScalePointers& scales) {
    const auto [x, weight, bias, residual, out] = pointers;
    const auto [images, height, width, in_channels, out_channels] = sizes;
    const auto [steps, units, start] = scales;
    Conv3x3<T, W> op = {};
    op.x = to_pointer<const T>(x, "x");
    op.weight = to_pointer<const W>(weight, "weight");
    op.bias = to_pointer<const float>(bias, "bias");
    op.residual = to_pointer<const T>(residual, "residual");
    op.out = to_pointer<T>(out, "out");
    op.images = images;
    op.height = height;
    op.width = width;
    op.in_channels = in_channels;
    op.out_channels = out_channels;
    op.upsample = upsample;
    op.tile = tile;
    op.scales = {to_pointer<const float>(steps, "steps"), to_pointer<const float>(units, "units"),
               to_pointer<const int32_t>(start, "start")};
    conv3x3(op, num_threads);
}

void conv3x3_binding(const ConvPointers& pointers, const ConvSizes& sizes, bool upsample, bool bf16, int num_threads, int tile,
                     const std::optional<ScalePointers>& scales) {
    const auto [images, height, width, in_channels, out_channels] = sizes;
    check_channels(out_channels, in_channels);
    check_tile(tile, !upsample && !bf16 && !scales);
    if (scales && !conv3x3_has_int8())
        throw py::value_error("conv3x3 in 8 bits needs a processor with AVX-512 VNNI or AVX-VNNI");
    if (!scales && bf16 && !conv3x3_has_bf16()) throw py::value_error("conv3x3 in bf16 needs a processor with AVX-512 BF16");
    check_range("num_threads", num_threads, 1, INT32_MAX);
    if (images < 0 || height < 0 || width < 0) throw py::value_error("images, height and width cannot be negative");
    if (images * height * width == 0) return;
    const auto [x, weight, bias, residual, out] = pointers;
    if (x == 0 || weight == 0 || out == 0) throw py::value_error("x, weight and out cannot be null pointers");
    if (scales)
        for (const uintptr_t address : *scales) require(address, "scales");
    const auto run = scales ? (bf16 ? run_conv3x3<bfloat16, int8_t> : run_conv3x3<float, int8_t>)
                            : (bf16 ? run_conv3x3<bfloat16, bfloat16> : run_conv3x3<float, float>);
    run(pointers, sizes, upsample, tile, num_threads, scales.value_or(ScalePointers{}));
}

void prepare_conv3x3_binding(uintptr_t weight, uintptr_t out, int64_t out_channels, int64_t in_channels, bool bf16,
                             int tile, const std::optional<ScalePointers>& scales) {
    check_channels(out_channels, in_channels);
    check_tile(tile, !bf16 && !scales);
    require(weight, "weight_ptr");
    require(out, "out_ptr");
    const float* from = to_pointer<const float>(weight, "weight_ptr");
    if (scales) {
        const auto [steps, units, start] = *scales;
        for (const uintptr_t address : *scales) require(address, "scales");
        prepare_conv3x3(from, to_pointer<const float>(steps, "steps"), to_pointer<int8_t>(out, "out_ptr"),
                        to_pointer<float>(units, "units"), to_pointer<int32_t>(start, "start"), out_channels, in_channels);
    } else if (bf16)
        prepare_conv3x3(from, to_pointer<bfloat16>(out, "out_ptr"), out_channels, in_channels);
    else
        prepare_conv3x3(from, to_pointer<float>(out, "out_ptr"), out_channels, in_channels, tile);
}

}  // namespace
}  // namespace ddim_fast

PYBIND11_MODULE(_native, module) {
    using namespace py::literals;
    module.doc() = "C++ and CUDA operators of ddim_fast on raw memory addresses";

    module.def("ddim_step", &ddim_fast::ddim_step_binding, "sample_ptr"_a, "model_output_ptr"_a, "noise_ptr"_a,
               "out_ptr"_a, "numel"_a, "coefficients"_a, "clip"_a, "num_threads"_a, py::kw_only(), "unconditional_ptr"_a = 0,
               "guidance"_a = 1.0f, "seeds_ptr"_a = 0, "image_numel"_a = 0, "step"_a = 0, "dtypes"_a = std::array<int, 3>{},
               py::call_guard<py::gil_scoped_release>(),
               R"(One DDIM update over arrays in host memory.

    m   = unconditional + guidance * (model_output - unconditional)
    x0  = clamp(p * sample + q * m, -clip, clip)
    eps = r * sample + s * m
    out = u * x0 + v * eps + sigma * noise

Each operation is rounded by itself to fp32 in this order: plain fp32 tensor operations give the same bits. The result
is rounded once more, to the dtype of out.

sample_ptr, model_output_ptr, out_ptr: addresses of numel values; out may be exactly one of the inputs if their dtypes
    have the same size.
noise_ptr: address of numel values, or 0.
coefficients: the seven numbers (p, q, r, s, u, v, sigma).
clip: a positive number, inf for no clipping. NaN stays NaN.
num_threads: how many threads may share the work; small arrays use fewer.
unconditional_ptr: address of numel values, or 0; then m is model_output.
guidance: a finite number, used with unconditional_ptr only.
seeds_ptr: address of the images' seeds, int64, or 0. The noise is then what seeded_noise draws for them in fp32, in the
    order of contiguous images; nothing is drawn where sigma is 0. Without noise and seeds the last term is left out.
image_numel: values of an image, a divisor of numel of at most 2^34; used with seeds_ptr only.
step: the number under which the noise is drawn, below 2^32.
dtypes: of (sample and noise, model_output and unconditional, out): 0 for fp32, 1 for bf16.

Raises ValueError for a null or unaligned address, and for what does not fit the description.)");

    module.def("group_norm_silu", &ddim_fast::group_norm_silu_binding, "pointers"_a, "sizes"_a, "eps"_a, "silu"_a,
               "channels_last"_a, "bf16"_a, "num_threads"_a, py::kw_only(), "pre_shift_stride"_a = py::none(),
               py::call_guard<py::gil_scoped_release>(),
               R"(GroupNorm over host memory, with what stands around it in a U-Net.

    v   = concat(x, skip) + pre_shift
    y   = (v - mean) / sqrt(var + eps) * weight + bias
    out = silu(y * (1 + scale) + shift) + residual

pointers: addresses of x, skip, residual, out, weight, bias, pre_shift, scale, shift; 0 leaves an optional one out. The
    first four are fp32, or bf16 if `bf16`; weight and bias are fp32 of one value a channel, the last three fp32 of one
    value an image and channel.
sizes: images, channels of x, channels of skip, positions (height * width), groups.
channels_last: whether x, skip, residual and out are (images, positions, channels) in memory.
num_threads: how many threads may share the work. Neither it nor the number of images changes a bit of the result.
pre_shift_stride: values from one image's pre_shift to the next one's; 0 where all have the same, None where they follow
    each other.

Raises ValueError for null addresses and sizes that do not fit.)");

    module.def("conv3x3", &ddim_fast::conv3x3_binding, "pointers"_a, "sizes"_a, "upsample"_a, "bf16"_a, "num_threads"_a,
               "tile"_a, py::kw_only(), "scales"_a = py::none(), py::call_guard<py::gil_scoped_release>(),
               R"(3x3 convolution with stride 1 and padding 1 over channels_last images in host memory.

pointers: addresses of x, weight, bias, residual and out; 0 leaves out bias and residual. bias is fp32, the others are bf16
    if `bf16` and fp32 otherwise. weight is what prepare_conv3x3 makes, in the same dtype; residual, which is added, and out
    are alike and may be the same.
sizes: images, height and width of x, channels of x, channels of out. Channels come in multiples of 16.
upsample: whether each pixel of x counts twice in both directions, as nearest-neighbour interpolation repeats it; out is
    then twice as high and as wide.
num_threads: how many threads may share the work. Neither it nor the number of images changes a bit of the result.
tile: of Winograd's algorithm, the outputs along each side of a tile: 2 or, in fp32 without upsample, 4. As in prepare_conv3x3.
scales: for products of 8-bit numbers, addresses of steps (16), units and start (both 16 x channels of out), as
    prepare_conv3x3 made them with the weights.

Raises ValueError for null addresses, for sizes that do not fit, and for what the processor lacks: see conv3x3_has_bf16 and
conv3x3_has_int8.)");

    module.def("prepare_conv3x3", &ddim_fast::prepare_conv3x3_binding, "weight_ptr"_a, "out_ptr"_a, "out_channels"_a,
               "in_channels"_a, "bf16"_a, "tile"_a, py::kw_only(), "scales"_a = py::none(),
               py::call_guard<py::gil_scoped_release>(),
               R"(Makes the weights of conv3x3, of fp32 weights of shape (out_channels, in_channels, 3, 3).

out_ptr: (tile + 2)^2 * out_channels * in_channels numbers, of bf16 or fp32; of int8 if there are scales.
tile: 2 or, in fp32, 4.
scales: addresses of steps, 16 fp32 numbers that bring the components of the transformed pixels to -128..127, and of the
    results units (fp32) and start (int32), 16 * out_channels of each.)");

    ddim_fast::bind_plan(module);

    module.def("instruction_set", &ddim_fast::instruction_set_name,
               "What the operators of the CPU use: avx512, avx2 or baseline. DDIM_FAST_CPU=baseline or avx2, read once, asks for "
               "less than the processor has.");
    module.def("conv3x3_has_bf16", &ddim_fast::conv3x3_has_bf16, "Whether conv3x3 takes bf16 on this processor.");
    module.def("conv3x3_has_int8", &ddim_fast::conv3x3_has_int8, "Whether conv3x3 takes scales on this processor.");

#ifdef DDIM_FAST_WITH_CUDA
    module.def("ddim_step_cuda", &ddim_fast::ddim_step_cuda_binding, "sample_ptr"_a, "model_output_ptr"_a, "noise_ptr"_a,
               "out_ptr"_a, "numel"_a, "coefficients"_a, "clip"_a, "stream"_a, py::kw_only(), "unconditional_ptr"_a = 0,
               "guidance"_a = 1.0f, "seeds_ptr"_a = 0, "image_numel"_a = 0, "step"_a = 0, "dtypes"_a = std::array<int, 3>{},
               "table_ptr"_a = 0, "table_rows"_a = 0, "index_ptr"_a = 0, py::call_guard<py::gil_scoped_release>(),
               R"(ddim_step over arrays on the current CUDA device.

Everything is as for ddim_step, and 2 in dtypes is fp16; noise drawn from seeds is made in fp32 and may differ from
seeded_noise in its last two bits.

stream: the address of a cudaStream_t (torch.cuda.current_stream().cuda_stream). The work is queued there and not
    waited for; it can be captured in a CUDA graph, which keeps the arguments it was captured with.
table_ptr: address on the device of fp32 coefficients of shape (table_rows, 7), which take the place of `coefficients`,
    or 0.
index_ptr: address on the device of an int64: the row to use, and the step of the noise. So one captured graph serves
    every step. Where it lies outside the table, out is NaN.

Raises ValueError as ddim_step does, and RuntimeError when the launch fails.)");

    module.def("group_norm_silu_cuda", &ddim_fast::group_norm_silu_cuda_binding, "pointers"_a, "sizes"_a, "eps"_a, "silu"_a,
               "channels_last"_a, "dtype"_a, "workspace_ptr"_a, "stream"_a, py::kw_only(), "pre_shift_stride"_a = py::none(),
               py::call_guard<py::gil_scoped_release>(),
               R"(group_norm_silu over arrays on the current CUDA device.

pointers, sizes, eps, silu, channels_last, pre_shift_stride: as for group_norm_silu.
dtype: of x, skip, residual and out: 0 for fp32, 1 for bf16, 2 for fp16.
workspace_ptr: address on the device of group_norm_silu_cuda_workspace bytes, or 0 where that is 0.
stream: as for ddim_step_cuda.

The same input gives the same bits on one device; another batch may change the last ones. Images whose addresses are not
multiples of 16 bytes are correct but slow, and so are those where no 16 bytes lie in one input and in whole groups.

Raises ValueError for null or unaligned addresses, sizes that do not fit and more than 2048 channels in a group, and
RuntimeError when the launch fails.)");

    module.def("group_norm_silu_cuda_workspace", &ddim_fast::group_norm_silu_cuda_workspace_binding, "sizes"_a,
               "channels_last"_a, "dtype"_a,
               "The bytes of device memory that group_norm_silu_cuda takes for its partial sums, on the current device.");
#endif
}
