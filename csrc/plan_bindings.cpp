#include "plan_bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "plan.h"
#include "product.h"

namespace py = pybind11;

namespace ddim_fast {
namespace {

using Segments = std::vector<std::pair<int64_t, bool>>;
using Buffers = std::vector<std::pair<int64_t, int64_t>>;
using Calls = std::vector<std::tuple<std::string, Buffers, std::vector<int64_t>, std::vector<double>>>;

std::unique_ptr<Plan> make_plan(const Segments& segments, const Calls& calls) {
    std::vector<Segment> named;
    for (const auto& [bytes, writable] : segments) named.push_back({bytes, writable});
    std::vector<Call> list;
    for (const auto& [name, buffers, integers, reals] : calls) {
        list.push_back({name, {}, integers, reals});
        for (const auto& [segment, offset] : buffers) list.back().buffers.push_back({segment, offset});
    }
    return std::make_unique<Plan>(named, list);
}

void run_plan(const Plan& plan, const std::vector<uintptr_t>& addresses, int64_t begin, int64_t end, int num_threads) {
    if (num_threads < 1) throw py::value_error("num_threads is " + std::to_string(num_threads) + ", but must be at least 1");
    std::vector<char*> segments;
    for (const uintptr_t address : addresses) segments.push_back(reinterpret_cast<char*>(address));
    plan.run(segments, begin, end, num_threads);
}

void prepare_product_binding(uintptr_t weight, uintptr_t out, int64_t out_channels, int64_t depth, bool bf16) {
    if (out_channels < 1 || depth < 1) throw py::value_error("out_channels and depth must be at least 1");
    if (weight == 0 || out == 0) throw py::value_error("weight_ptr and out_ptr cannot be null pointers");
    if (weight % sizeof(float) != 0 || out % (bf16 ? 2 : 4) != 0) throw py::value_error("weight_ptr or out_ptr is not aligned");
    const auto* const from = reinterpret_cast<const float*>(weight);
    if (bf16)
        prepare_product(from, reinterpret_cast<bfloat16*>(out), out_channels, depth);
    else
        prepare_product(from, reinterpret_cast<float*>(out), out_channels, depth);
}

}  // namespace

void bind_plan(py::module_& module) {
    using namespace py::literals;
    py::class_<Plan>(module, "Plan", py::module_local(), R"(A recorded run of operators: see csrc/plan.h.

segments: for each, its size in bytes and whether calls may write to it.
calls: for each, the operator's name, its buffers as (segment, offset in bytes), -1 for none, its integers and its numbers, in
    the order in which csrc/plan.cpp reads them.

Raises ValueError where a call is not one, or reaches beyond a segment.)")
        .def(py::init(&make_plan), "segments"_a, "calls"_a)
        .def("run", &run_plan, "segments"_a, "begin"_a, "end"_a, "num_threads"_a, py::call_guard<py::gil_scoped_release>(),
             R"(Executes the calls [begin, end).

segments: the address of each, a multiple of 8; whoever calls keeps them alive and of their stated sizes, and lets one thread
    at a time run over the same memory.
num_threads: how many threads may share the work.

Raises ValueError for what does not fit the plan, and IndexError where a number in memory lies outside its table.)")
        .def("__len__", &Plan::size);

    module.def("prepare_product", &prepare_product_binding, "weight_ptr"_a, "out_ptr"_a, "out_channels"_a, "depth"_a, "bf16"_a,
               py::call_guard<py::gil_scoped_release>(),
               R"(Makes the weights of a plan's product, of fp32 weights of shape (out_channels, kernel_height, kernel_width,
in_channels), whose last three dimensions are the depth.

out_ptr: prepared_product_numbers(out_channels, depth) numbers, of bf16 or fp32.)");
    module.def("prepared_product_numbers", &prepared_product_numbers, "out_channels"_a, "depth"_a,
               "How many numbers prepare_product makes.");
}

}  // namespace ddim_fast
