/* Plain C: used where no other set runs; the others are tested against it. */
#include "lanes8.h"
#include "levels.h"
#include "panel.h"
#include "vector_set.h"

#define OM_EXACT_TILE 4

typedef struct { float lane[OM_LANES]; } fvec;
typedef int x_raw;

#define OM_EACH_LANE for (int i = 0; i < OM_LANES; i++)

OM_INLINE fvec fv_broadcast(float value) {
    fvec v;
    OM_EACH_LANE v.lane[i] = value;
    return v;
}

OM_INLINE fvec fv_load(const float *p) {
    fvec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

OM_INLINE fvec fv_zero(void) { return fv_broadcast(0.0f); }
OM_INLINE void fv_store(float *p, fvec v) { __builtin_memcpy(p, &v, sizeof v); }

OM_INLINE fvec fv_add(fvec a, fvec b) {
    OM_EACH_LANE a.lane[i] += b.lane[i];
    return a;
}

OM_INLINE fvec fv_mul(fvec a, fvec b) {
    OM_EACH_LANE a.lane[i] *= b.lane[i];
    return a;
}

OM_INLINE fvec fv_fma(fvec a, fvec b, fvec c) { return fv_add(fv_mul(a, b), c); }

OM_INLINE float fv_sum(fvec v) {
    return ((v.lane[0] + v.lane[4]) + (v.lane[2] + v.lane[6])) + ((v.lane[1] + v.lane[5]) + (v.lane[3] + v.lane[7]));
}

OM_INLINE fvec fv_halves(float first, float second) {
    fvec v;
    OM_EACH_LANE v.lane[i] = i < OM_LANES / 2 ? first : second;
    return v;
}

OM_DEFINE_CHUNK_END
OM_DEFINE_SCALES_BY_TABLE

OM_INLINE x_raw load_raw(const int codec, const uint8_t *codes, const int num_blocks) {
    return (void)codec, (void)codes, num_blocks;
}

OM_INLINE fvec x_vector(const int codec, x_raw raw, const uint8_t *codes, const int k) {
    static const float mxfp4_values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                           -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    fvec v;
    (void)raw;
    if (codec == OM_FP32) return fv_load((const float *)codes + OM_LANES * k);
    for (int lane = 0; lane < OM_LANES; lane++) {
        if (codec == OM_INT8) {
            v.lane[lane] = (float)(int8_t)codes[OM_LANES * k + lane];
        } else if (codec == OM_BF16) {
            uint16_t bits;
            __builtin_memcpy(&bits, codes + 2 * (OM_LANES * k + lane), 2);
            v.lane[lane] = om_bf16_to_float(bits);
        } else {
            const int nibble = codes[4 * lane + k / 2] >> (k % 2 * 4) & 15;
            v.lane[lane] = (codec == OM_NF4 ? om_nf4_values : mxfp4_values)[nibble];
        }
    }
    return v;
}

#include "elementwise.h"
#include "rows.h"

const om_isa om_isa_portable = {"portable", OM_ROW_TABLE, OM_ELEMENTWISE_TABLE, &om_panels_portable, &om_vectors_portable};
