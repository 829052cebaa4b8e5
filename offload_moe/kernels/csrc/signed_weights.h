/* For instruction sets that multiply signed weights: nothing to correct, and no registers for the dynamic map. */
#ifndef OM_SIGNED_WEIGHTS_H
#define OM_SIGNED_WEIGHTS_H

#include "om_kernels.h"

typedef int dot_seed;
OM_INLINE dot_seed seed_one(const int32_t *correction) { return (void)correction, 0; }
OM_INLINE dot_seed seed_halves(const int32_t *first, const int32_t *second) { return (void)first, (void)second, 0; }

/* As integers and in a pass of its own: it keeps the vector units free, and reading it back does not wait for the stores. */
OM_INLINE void look_up_scales(const uint8_t *bytes, int64_t count, float *out) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        __builtin_memcpy(&bits, &om_dynamic_map[bytes[i]], sizeof bits);
        __builtin_memcpy(out + i, &bits, sizeof bits);
    }
}

#endif
