// philox.h for the tests, through ctypes.
#include <cstring>

#include "philox.h"

using namespace ddim_fast;

#define EXPORT extern "C" __attribute__((visibility("default"))) void

EXPORT philox(const uint32_t* counter, const uint32_t* key, uint32_t* words) {
    const PhiloxWords out = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    std::memcpy(words, out.word, sizeof out.word);
}

EXPORT normals(const uint32_t* words, int64_t blocks, bool fast, float* out) {
    for (int64_t i = 0; i < blocks; ++i) {
        const PhiloxWords block{{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]}};
        const Normals z = fast ? fast_normals(block) : exact_normals(block);
        std::memcpy(out + 4 * i, z.value, sizeof z.value);
    }
}
