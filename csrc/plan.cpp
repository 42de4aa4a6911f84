#include "plan.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>

#include "attention.h"
#include "conv3x3.h"
#include "ddim_step.h"
#include "elementwise.h"
#include "group_norm_silu.h"
#include "parallel.h"
#include "product.h"

namespace ddim_fast {

using Segments = const std::vector<char*>&;

struct Plan::Step {
    virtual ~Step() = default;
    virtual void run(Segments segments, int num_threads) const = 0;
};

namespace {

// The product of sizes, which none may be negative.
int64_t multiply(std::initializer_list<int64_t> sizes) {
    int64_t product = 1;
    for (const int64_t size : sizes)
        if (size < 0 || __builtin_mul_overflow(product, size, &product)) throw PlanError("a size is out of range");
    return product;
}

template <typename T>
T* at(Segments segments, Buffer b) {
    return b.segment < 0 ? nullptr : reinterpret_cast<T*>(segments[b.segment] + b.offset);
}

// Takes the arguments of a call one after the other, and checks what they reach.
class Arguments {
public:
    Arguments(const Call& call, const std::vector<Segment>& segments) : call_(call), segments_(segments) {}

    int64_t integer(int64_t least = INT64_MIN, int64_t most = INT64_MAX) {
        if (integers_ == call_.integers.size()) throw PlanError("integers are missing");
        const int64_t value = call_.integers[integers_++];
        if (value < least || value > most) throw PlanError("integer " + std::to_string(value) + " is out of range");
        return value;
    }
    int64_t size() { return integer(0, int64_t(1) << 40); }
    int64_t positive() { return integer(1, int64_t(1) << 40); }
    bool flag() { return integer(0, 1) != 0; }
    Dtype dtype() { return static_cast<Dtype>(integer(0, 1)); }  // fp32 or bf16

    float real() {
        if (reals_ == call_.reals.size()) throw PlanError("numbers are missing");
        return static_cast<float>(call_.reals[reals_++]);
    }

    // The next buffer, of so many bytes, whose address is a multiple of `alignment`.
    Buffer reads(int64_t bytes, int64_t alignment) { return take(bytes, alignment, false, false); }
    Buffer may_read(int64_t bytes, int64_t alignment) { return take(bytes, alignment, false, true); }
    Buffer writes(int64_t bytes, int64_t alignment) { return take(bytes, alignment, true, false); }

    // What is written is nothing else that the call reaches, but for buffers that begin where it does: operators that allow
    // that read an element before they write it.
    void finish() const {
        if (buffers_ != call_.buffers.size() || integers_ != call_.integers.size() || reals_ != call_.reals.size())
            throw PlanError("there are too many arguments");
        for (const Range& written : ranges_)
            for (const Range& other : ranges_)
                if (written.is_written && &written != &other && written.segment == other.segment && written.begin < other.end &&
                    other.begin < written.end && (other.is_written || other.begin != written.begin || other.end != written.end))
                    throw PlanError("what it writes overlaps what it reads");
    }

private:
    struct Range {
        int64_t segment, begin, end;
        bool is_written;
    };

    Buffer take(int64_t bytes, int64_t alignment, bool is_written, bool is_optional) {
        if (buffers_ == call_.buffers.size()) throw PlanError("buffers are missing");
        const Buffer b = call_.buffers[buffers_++];
        if (b.segment < 0) {
            if (!is_optional) throw PlanError("a buffer is missing");
            return b;
        }
        if (b.segment >= static_cast<int64_t>(segments_.size())) throw PlanError("a segment is missing");
        const Segment& segment = segments_[b.segment];
        if (b.offset < 0 || bytes > segment.bytes || b.offset > segment.bytes - bytes)
            throw PlanError("a buffer lies outside its segment");
        if (b.offset % alignment != 0) throw PlanError("a buffer is not aligned");
        if (is_written && !segment.writable) throw PlanError("it writes to a segment that is only read");
        ranges_.push_back({b.segment, b.offset, b.offset + bytes, is_written});
        return b;
    }

    const Call& call_;
    const std::vector<Segment>& segments_;
    std::vector<Range> ranges_;
    size_t buffers_ = 0, integers_ = 0, reals_ = 0;
};

using StepPointer = std::unique_ptr<Plan::Step>;

// ---- Each operator's arguments: its dtype, where it has one, then its sizes, in the order of its struct, then its buffers ----

template <typename T, typename W>
struct Conv3x3Step : Plan::Step {
    Conv3x3<T, W> op = {};
    Buffer x, weight, bias, residual, out, steps, units, start;

    explicit Conv3x3Step(Arguments& a) {
        op.images = a.size(), op.height = a.size(), op.width = a.size();
        op.in_channels = a.positive(), op.out_channels = a.positive();
        op.upsample = a.flag();
        op.tile = static_cast<int>(a.integer(2, 4));
        if (op.in_channels % kConv3x3Channels != 0 || op.out_channels % kConv3x3Channels != 0)
            throw PlanError("channels are no multiples of 16");
        if (op.tile != 2 && (op.tile != 4 || op.upsample || sizeof(W) != sizeof(float)))
            throw PlanError("there is no such tile");
        const int64_t weights = multiply({components(op.tile), op.in_channels, op.out_channels});
        const int64_t pixels = multiply({op.images, op.height, op.width});
        const int64_t results = multiply({pixels, op.out_channels, op.upsample ? 4 : 1});
        x = a.reads(multiply({pixels, op.in_channels, sizeof(T)}), sizeof(T));
        weight = a.reads(multiply({weights, sizeof(W)}), sizeof(W));
        bias = a.may_read(multiply({op.out_channels, sizeof(float)}), sizeof(float));
        residual = a.may_read(multiply({results, sizeof(T)}), sizeof(T));
        out = a.writes(multiply({results, sizeof(T)}), sizeof(T));
        steps = units = start = {-1, 0};
        if constexpr (kInt8<W>) {
            steps = a.reads(16 * sizeof(float), sizeof(float));
            units = a.reads(multiply({16, op.out_channels, sizeof(float)}), sizeof(float));
            start = a.reads(multiply({16, op.out_channels, sizeof(int32_t)}), sizeof(int32_t));
        }
    }
    void run(Segments s, int num_threads) const override {
        Conv3x3<T, W> call = op;
        call.x = at<T>(s, x), call.weight = at<W>(s, weight), call.bias = at<float>(s, bias);
        call.residual = at<T>(s, residual), call.out = at<T>(s, out);
        call.scales = {at<float>(s, steps), at<float>(s, units), at<int32_t>(s, start)};
        conv3x3(call, num_threads);
    }
};

StepPointer make_conv3x3(Arguments& a) {
    const bool bf16 = a.dtype() == Dtype::bf16, int8 = a.flag();
    if (int8 && !conv3x3_has_int8()) throw PlanError("8-bit products need a processor with AVX-512 VNNI or AVX-VNNI");
    if (!int8 && bf16 && !conv3x3_has_bf16()) throw PlanError("bf16 needs a processor with AVX-512 BF16");
    if (int8 && bf16) return std::make_unique<Conv3x3Step<bfloat16, int8_t>>(a);
    if (int8) return std::make_unique<Conv3x3Step<float, int8_t>>(a);
    if (bf16) return std::make_unique<Conv3x3Step<bfloat16, bfloat16>>(a);
    return std::make_unique<Conv3x3Step<float, float>>(a);
}

template <typename T>
struct GroupNormSiluStep : Plan::Step {
    GroupNormSilu<T> op = {};
    Buffer x, skip, residual, out, weight, bias, pre_shift, scale, shift;

    explicit GroupNormSiluStep(Arguments& a) {
        op.images = a.size(), op.x_channels = a.positive(), op.skip_channels = a.size(), op.positions = a.size();
        op.groups = a.positive();
        op.pre_shift_stride = a.size();
        op.silu = a.flag(), op.channels_last = a.flag();
        op.eps = a.real();
        const int64_t channels = op.x_channels + op.skip_channels;
        if (channels % op.groups != 0) throw PlanError("the groups do not divide the channels");
        if (!(op.eps >= 0)) throw PlanError("eps is negative");
        const int64_t pixels = multiply({op.images, op.positions}), f = sizeof(float);
        const int64_t shifts = op.images == 0 ? 0 : multiply({op.images - 1, op.pre_shift_stride}) + channels;
        x = a.reads(multiply({pixels, op.x_channels, sizeof(T)}), sizeof(T));
        skip = a.may_read(multiply({pixels, op.skip_channels, sizeof(T)}), sizeof(T));
        residual = a.may_read(multiply({pixels, channels, sizeof(T)}), sizeof(T));
        out = a.writes(multiply({pixels, channels, sizeof(T)}), sizeof(T));
        weight = a.reads(multiply({channels, f}), f), bias = a.reads(multiply({channels, f}), f);
        pre_shift = a.may_read(multiply({shifts, f}), f);
        scale = a.may_read(multiply({op.images, channels, f}), f), shift = a.may_read(multiply({op.images, channels, f}), f);
        if ((skip.segment < 0) != (op.skip_channels == 0)) throw PlanError("skip does not fit its channels");
        const auto same = [](Buffer p, Buffer q) { return p.segment >= 0 && p.segment == q.segment && p.offset == q.offset; };
        if (op.skip_channels && (same(out, x) || same(out, skip))) throw PlanError("what it writes overlaps what it reads");
    }
    void run(Segments s, int num_threads) const override {
        GroupNormSilu<T> call = op;
        call.x = at<T>(s, x), call.skip = at<T>(s, skip), call.residual = at<T>(s, residual), call.out = at<T>(s, out);
        call.weight = at<float>(s, weight), call.bias = at<float>(s, bias), call.pre_shift = at<float>(s, pre_shift);
        call.scale = at<float>(s, scale), call.shift = at<float>(s, shift);
        group_norm_silu(call, num_threads);
    }
};

template <typename T>
struct ProductStep : Plan::Step {
    Product<T> op = {};
    Buffer x, weight, bias, residual, out;

    explicit ProductStep(Arguments& a) {
        op.images = a.size(), op.height = a.size(), op.width = a.size(), op.in_channels = a.positive();
        op.out_height = a.size(), op.out_width = a.size(), op.out_channels = a.positive();
        op.kernel_height = a.positive(), op.kernel_width = a.positive();
        op.stride_height = a.positive(), op.stride_width = a.positive();
        op.top = a.size(), op.left = a.size();
        const int64_t depth = multiply({op.kernel_height, op.kernel_width, op.in_channels});
        multiply({op.out_height, op.stride_height}), multiply({op.out_width, op.stride_width});
        const bool is_linear = op.kernel_height * op.kernel_width * op.stride_height * op.stride_width == 1;
        if (is_linear && (op.top || op.left || op.height != op.out_height || op.width != op.out_width))
            throw PlanError("a linear layer keeps its positions");
        multiply({depth + 16, op.out_channels + 16, 8});
        const int64_t results = multiply({op.images, op.out_height, op.out_width, op.out_channels, sizeof(T)});
        x = a.reads(multiply({op.images, op.height, op.width, op.in_channels, sizeof(T)}), sizeof(T));
        weight = a.reads(multiply({prepared_product_numbers(op.out_channels, depth), sizeof(T)}), sizeof(T));
        bias = a.may_read(multiply({op.out_channels, sizeof(float)}), sizeof(float));
        residual = a.may_read(results, sizeof(T));
        out = a.writes(results, sizeof(T));
        if (out.segment == x.segment && out.offset == x.offset) throw PlanError("what it writes overlaps what it reads");
    }
    void run(Segments s, int num_threads) const override {
        Product<T> call = op;
        call.x = at<T>(s, x), call.weight = at<T>(s, weight), call.bias = at<float>(s, bias);
        call.residual = at<T>(s, residual), call.out = at<T>(s, out);
        product(call, num_threads);
    }
};

StepPointer make_product(Arguments& a) {
    if (a.dtype() == Dtype::fp32) return std::make_unique<ProductStep<float>>(a);
    if (!conv3x3_has_bf16()) throw PlanError("bf16 needs a processor with AVX-512 BF16");
    return std::make_unique<ProductStep<bfloat16>>(a);
}

template <typename T>
struct AttentionStep : Plan::Step {
    Attention<T> op = {};
    Buffer query, key, value, out;

    explicit AttentionStep(Arguments& a) {
        op.images = a.size(), op.heads = a.size(), op.queries = a.size();
        op.keys = a.integer(1, 1 << 24), op.dim = a.integer(1, 1 << 24);
        for (TokenStrides* const s : {&op.query_strides, &op.key_strides, &op.value_strides, &op.out_strides})
            s->image = a.size(), s->head = a.size(), s->token = a.size();
        op.scale = a.real();
        const auto bytes = [&](TokenStrides s, int64_t tokens) -> int64_t {
            if (op.images == 0 || op.heads == 0 || tokens == 0) return 0;
            const int64_t parts[] = {multiply({op.images - 1, s.image}), multiply({op.heads - 1, s.head}),
                                     multiply({tokens - 1, s.token}), op.dim};
            int64_t last = 0;
            for (const int64_t part : parts)
                if (__builtin_add_overflow(last, part, &last)) throw PlanError("a size is out of range");
            if (multiply({op.images, op.heads, tokens, op.dim}) > last) throw PlanError("tokens overlap");
            return multiply({last, sizeof(T)});
        };
        query = a.reads(bytes(op.query_strides, op.queries), sizeof(T));
        key = a.reads(bytes(op.key_strides, op.keys), sizeof(T));
        value = a.reads(bytes(op.value_strides, op.keys), sizeof(T));
        out = a.writes(bytes(op.out_strides, op.queries), sizeof(T));
        for (const Buffer b : {query, key, value})
            if (b.segment == out.segment && b.offset == out.offset) throw PlanError("what it writes overlaps what it reads");
    }
    void run(Segments s, int num_threads) const override {
        Attention<T> call = op;
        call.query = at<T>(s, query), call.key = at<T>(s, key), call.value = at<T>(s, value), call.out = at<T>(s, out);
        attention(call, num_threads);
    }
};

// With a table of `rows` coefficients, of which row *index counts; *index is the step of the noise, too.
struct DdimStepStep : Plan::Step {
    DdimStep op = {};
    int64_t rows;
    Buffer sample, output, noise, seeds, table, index, out;

    explicit DdimStepStep(Arguments& a) {
        op.sample_dtype = a.dtype(), op.output_dtype = a.dtype(), op.out_dtype = a.dtype();
        op.numel = a.size(), op.image_numel = a.integer(1, int64_t(1) << 34);
        rows = a.positive();
        op.clip = a.real();
        op.guidance = 1;
        if (!(op.clip > 0)) throw PlanError("clip is not positive");
        if (op.numel % op.image_numel != 0) throw PlanError("the images do not have equal sizes");
        const int64_t in = size_of(op.sample_dtype), model = size_of(op.output_dtype), result = size_of(op.out_dtype);
        sample = a.reads(multiply({op.numel, in}), in);
        output = a.reads(multiply({op.numel, model}), model);
        noise = a.may_read(multiply({op.numel, in}), in);
        seeds = a.may_read(multiply({op.numel / op.image_numel, 8}), 8);
        table = a.reads(multiply({rows, sizeof(DdimCoefficients)}), sizeof(float));
        index = a.reads(8, 8);
        out = a.writes(multiply({op.numel, result}), result);
        if (noise.segment >= 0 && seeds.segment >= 0) throw PlanError("there are noise and seeds");
    }
    void run(Segments s, int num_threads) const override {
        DdimStep call = op;
        const int64_t row = *at<int64_t>(s, index);
        if (row < 0 || row >= rows) throw std::out_of_range("a step's number lies outside its table");
        call.coefficients = at<DdimCoefficients>(s, table)[row];
        call.step = static_cast<uint32_t>(row);
        call.sample = at<void>(s, sample), call.model_output = at<void>(s, output), call.noise = at<void>(s, noise);
        call.seeds = at<int64_t>(s, seeds), call.out = at<void>(s, out);
        ddim_step(call, num_threads);
    }
};

struct ElementwiseStep : Plan::Step {
    Elementwise op = {};
    std::array<Buffer, 3> inputs;
    Buffer out;

    explicit ElementwiseStep(Arguments& a) {
        op.arithmetic = static_cast<Arithmetic>(a.integer(0, static_cast<int>(Arithmetic::addcmul)));
        for (int64_t& size : op.sizes) size = a.size();
        const int count = inputs_of(op.arithmetic);
        for (int i = 0; i < count; ++i) inputs[i] = take(a, op.inputs[i], false);
        out = take(a, op.out, true);
        op.number = a.real(), op.most = a.real();
    }
    Buffer take(Arguments& a, Operand& x, bool is_written) {
        x.dtype = a.dtype();
        int64_t last = 0, numbers = 1;
        for (int i = 0; i < kDimensions; ++i) {
            x.strides[i] = a.size();
            numbers = multiply({numbers, op.sizes[i]});
            const int64_t reach = op.sizes[i] == 0 ? 0 : multiply({op.sizes[i] - 1, x.strides[i]});
            if (__builtin_add_overflow(last, reach, &last)) throw PlanError("a size is out of range");
        }
        if (is_written && numbers > 0 && numbers - 1 > last) throw PlanError("elements that it writes overlap");
        const int64_t bytes = numbers == 0 ? 0 : multiply({last + 1, size_of(x.dtype)});
        return is_written ? a.writes(bytes, size_of(x.dtype)) : a.reads(bytes, size_of(x.dtype));
    }
    void run(Segments s, int num_threads) const override {
        Elementwise call = op;
        for (int i = 0; i < inputs_of(op.arithmetic); ++i) call.inputs[i].data = at<void>(s, inputs[i]);
        call.out.data = at<void>(s, out);
        elementwise(call, num_threads);
    }
};

// out[i] = rows[index[i]], rows of so many bytes, `stride` bytes apart.
struct GatherStep : Plan::Step {
    int64_t rows, stride, row_bytes, count;
    Buffer from, index, out;

    explicit GatherStep(Arguments& a) {
        rows = a.positive(), stride = a.size(), row_bytes = a.size(), count = a.size();
        int64_t reach = multiply({rows - 1, stride});
        if (__builtin_add_overflow(reach, row_bytes, &reach)) throw PlanError("a size is out of range");
        from = a.reads(reach, 2), index = a.reads(multiply({count, 8}), 8);
        out = a.writes(multiply({count, row_bytes}), 2);
        if (out.segment == from.segment && out.offset == from.offset) throw PlanError("what it writes overlaps what it reads");
    }
    void run(Segments s, int num_threads) const override {
        const auto* const numbers = at<int64_t>(s, index);
        parallel_for(count, 1, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                if (numbers[i] < 0 || numbers[i] >= rows) throw std::out_of_range("an index lies outside its table");
                std::memcpy(at<char>(s, out) + i * row_bytes, at<char>(s, from) + numbers[i] * stride, row_bytes);
            }
        });
    }
};

template <template <typename> class S>
StepPointer make_for_dtype(Arguments& a) {
    if (a.dtype() == Dtype::bf16) return std::make_unique<S<bfloat16>>(a);
    return std::make_unique<S<float>>(a);
}

template <typename S>
StepPointer make(Arguments& a) {
    return std::make_unique<S>(a);
}

const std::map<std::string, StepPointer (*)(Arguments&)>& operators() {
    static const std::map<std::string, StepPointer (*)(Arguments&)> all = {
        {"conv3x3", make_conv3x3},
        {"group_norm_silu", make_for_dtype<GroupNormSiluStep>},
        {"product", make_product},
        {"attention", make_for_dtype<AttentionStep>},
        {"ddim_step", make<DdimStepStep>},
        {"elementwise", make<ElementwiseStep>},
        {"gather", make<GatherStep>},
    };
    return all;
}

}  // namespace

Plan::Plan(const std::vector<Segment>& segments, const std::vector<Call>& calls) : segments_(segments.size()) {
    for (const Call& call : calls) {
        try {
            const auto found = operators().find(call.name);
            if (found == operators().end()) throw PlanError("there is no such operator");
            Arguments arguments(call, segments);
            StepPointer step = found->second(arguments);
            arguments.finish();
            steps_.push_back(std::move(step));
        } catch (const PlanError& error) {
            throw PlanError("call " + std::to_string(steps_.size()) + ", " + call.name + ": " + error.what());
        }
    }
}

Plan::~Plan() = default;

void Plan::run(const std::vector<char*>& segments, int64_t begin, int64_t end, int num_threads) const {
    if (segments.size() != segments_) throw PlanError("the plan has " + std::to_string(segments_) + " segments");
    if (begin < 0 || begin > end || end > size()) throw PlanError("the plan has " + std::to_string(size()) + " calls");
    for (char* const segment : segments)
        if (reinterpret_cast<uintptr_t>(segment) % kAlignment != 0) throw PlanError("a segment is not aligned");
    run_in_team(num_threads, [&] {
        for (int64_t i = begin; i < end && !team->error; ++i) steps_[i]->run(segments, team->threads);
    });
}

}  // namespace ddim_fast
