// A recorded run: operator calls over named memory, executed by one call from Python.
//
// Memory comes in segments, such as the weights, the inputs and one for everything that lives for a while between two calls. A
// buffer is named by its segment and its offset in bytes there, so that a plan can be moved, checked and written to a file. The
// calls' extents are checked when the plan is made: a plan that was made reads and writes nothing outside its segments.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ddim_fast {

// A plan that is not one; the message says which call and why.
struct PlanError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

struct Segment {
    int64_t bytes;
    bool writable;
};

struct Buffer {
    int64_t segment;  // negative: there is none
    int64_t offset;
};

// An operator's name and arguments, in the order in which plan.cpp lists them.
struct Call {
    std::string name;
    std::vector<Buffer> buffers;
    std::vector<int64_t> integers;
    std::vector<double> reals;
};

class Plan {
public:
    // Throws PlanError.
    Plan(const std::vector<Segment>& segments, const std::vector<Call>& calls);
    ~Plan();

    // The calls [begin, end), in order. segments: where each begins, a multiple of kAlignment.
    void run(const std::vector<char*>& segments, int64_t begin, int64_t end, int num_threads) const;

    int64_t size() const { return static_cast<int64_t>(steps_.size()); }

    static constexpr int64_t kAlignment = 8;

    struct Step;

private:
    size_t segments_;
    std::vector<std::unique_ptr<Step>> steps_;
};

}  // namespace ddim_fast
