/* Vectors of 16 lanes in plain C: the definition that every other set is compared with. */
#include "vector.h"

#define OM_HEADS 1
#define OM_AT_ONCE(heads) (4 / (heads))
#define OM_EACH_LANE for (int j = 0; j < OM_LANES; j++)

typedef struct { float lane[OM_LANES]; } vec;

OM_INLINE vec vec_load(const float *p) {
    vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
OM_INLINE vec vec_load_bf16(const uint16_t *p) {
    vec v;
    OM_EACH_LANE v.lane[j] = om_bf16_to_float(p[j]);
    return v;
}
OM_INLINE vec vec_load_fp16(const uint16_t *p) {
    vec v;
    OM_EACH_LANE v.lane[j] = om_fp16_to_float(p[j]);
    return v;
}
OM_INLINE void vec_store(float *p, vec v) { __builtin_memcpy(p, &v, sizeof v); }
OM_INLINE vec vec_broadcast(float value) {
    vec v;
    OM_EACH_LANE v.lane[j] = value;
    return v;
}
OM_INLINE vec vec_add(vec a, vec b) {
    OM_EACH_LANE a.lane[j] += b.lane[j];
    return a;
}
OM_INLINE vec vec_mul(vec a, vec b) {
    OM_EACH_LANE a.lane[j] *= b.lane[j];
    return a;
}
OM_INLINE vec vec_fma(vec a, vec b, vec c) {
    OM_EACH_LANE a.lane[j] = om_fma(a.lane[j], b.lane[j], c.lane[j]);
    return a;
}
OM_INLINE vec vec_greater(vec a, vec b) {
    OM_EACH_LANE a.lane[j] = a.lane[j] > b.lane[j] ? a.lane[j] : b.lane[j];
    return a;
}
OM_INLINE float vec_sum(vec v) {
    for (int count = OM_LANES / 2; count > 0; count /= 2)
        for (int j = 0; j < count; j++) v.lane[j] += v.lane[j + count];
    return v.lane[0];
}
OM_INLINE void vec_sums(const vec *v, float *sums) {
    for (int n = 0; n < 4; n++) sums[n] = vec_sum(v[n]);
}

#include "vector_loops.h"

const om_vector_set om_vectors_portable = OM_VECTOR_TABLE;
