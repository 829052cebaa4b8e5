/* What a library of kernels exports, after their text: each takes one struct by value. See `shim.py`, which writes the list. */
#pragma once
#include "fibers.h"

namespace shim {

struct entry {
    const char *name; /* nullptr after the last */
    uint64_t num_bytes; /* of its struct */
    void (*run)(const void *params, const unsigned *grid, const unsigned *block, unsigned seed);
};

template <auto kernel> struct entry_of;
template <class P, void (*kernel)(P)> struct entry_of<kernel> {
    static void run(const void *params, const unsigned *grid, const unsigned *block, unsigned seed) {
        alignas(P) char copy[sizeof(P)];
        __builtin_memcpy(copy, params, sizeof copy);
        const P &p = *(const P *)copy;
        launch(dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), seed, [&p]() __attribute__((no_sanitize("thread"))) { kernel(p); });
    }
    static constexpr entry named(const char *name) { return {name, sizeof(P), run}; }
};

} // namespace shim

#define SHIM_KERNELS(...) extern "C" __attribute__((visibility("default"))) const shim::entry shim_kernels[] = {__VA_ARGS__ {}};
#define SHIM_KERNEL(name) shim::entry_of<name>::named(#name),
