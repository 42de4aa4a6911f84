// Included where it is compiled: by the CUDA source, and once for each instruction set by each_cpu.h.

// The update of one element, or of a vector of them, without its noise.
template <typename Value>
DDIM_FAST_HOST_DEVICE Value ddim_step_element(Value x, Value m, const DdimCoefficients& c, float clip) {
    const Value bound = Value{} + clip;
    Value x0 = c.x0_from_sample * x + c.x0_from_output * m;
    // Comparisons with NaN are false, so NaN falls through; fmin and fmax would turn it into a number.
    x0 = x0 < -bound ? -bound : x0;
    x0 = x0 > bound ? bound : x0;
    const Value eps = c.eps_from_sample * x + c.eps_from_output * m;
    return c.prev_from_x0 * x0 + c.prev_from_eps * eps;
}
