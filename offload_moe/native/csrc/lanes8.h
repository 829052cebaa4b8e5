/* Shared by the sets of eight lanes: a unit is one block, whose scale is broadcast from memory. */
#ifndef OM_LANES8_H
#define OM_LANES8_H

#define OM_LANES 8
#define OM_UNIT_BLOCKS 1

/* Scales of a chunk that ends early, without reading past them. */
#define OM_DEFINE_CHUNK_END \
    OM_INLINE fvec fv_load_some(const float *p, const int count) { \
        if (count == OM_LANES) return fv_load(p); \
        float some[OM_LANES] = {0}; \
        for (int i = 0; i < count; i++) some[i] = p[i]; \
        return fv_load(some); \
    } \
    OM_INLINE fvec fv_pick(fvec a, fvec b, const int count) { \
        float first[OM_LANES], second[OM_LANES]; \
        fv_store(first, a), fv_store(second, b); \
        for (int i = count; i < OM_LANES; i++) first[i] = second[i]; \
        return fv_load(first); \
    } \
    OM_INLINE fvec spread(const int codec, const float *scales, const int unit) { \
        return codec == OM_MXFP4 ? fv_halves(scales[2 * unit], scales[2 * unit + 1]) : fv_broadcast(scales[unit]); \
    }

/* For sets without a quicker way. */
#define OM_DEFINE_SCALES_BY_TABLE \
    OM_INLINE fvec powers_of_two(const uint8_t *bytes, const int count) { \
        float scales[OM_LANES] = {0}; \
        for (int i = 0; i < count; i++) scales[i] = om_e8m0(bytes[i]); \
        return fv_load(scales); \
    }

#endif
