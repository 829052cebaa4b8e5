/* Plain C: serves where no other set does, and is what the others are tested against. */
#include "levels.h"
#include "om_kernels.h"
#include "signed_weights.h"

#define OM_LANES 8
#define OM_FAST_ROWS(num_tokens) 1
#define OM_EXACT_ROWS 1
#define OM_EXACT_TILE 4

typedef struct { float lane[OM_LANES]; } fvec;
typedef struct { int8_t weight[OM_BLOCK]; } qblock;
typedef struct { fvec v[OM_BLOCK / OM_LANES]; } xblock;

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

OM_INLINE qblock look_up_levels(const uint8_t *codes, const int8_t *levels) {
    qblock block;
    for (int i = 0; i < OM_BLOCK / 2; i++) {
        block.weight[i] = levels[codes[i] & 15];
        block.weight[OM_BLOCK / 2 + i] = levels[codes[i] >> 4];
    }
    return block;
}

OM_INLINE qblock q_nf4(const uint8_t *codes) {
    static const int8_t levels[16] = {OM_NF4_LEVELS};
    return look_up_levels(codes, levels);
}

OM_INLINE qblock q_mxfp4(const uint8_t *codes) {
    static const int8_t levels[16] = {OM_MXFP4_LEVELS};
    return look_up_levels(codes, levels);
}

OM_INLINE qblock q_int8(const uint8_t *codes) {
    qblock block;
    __builtin_memcpy(&block, codes, sizeof block);
    return block;
}

OM_INLINE fvec fv_dot(qblock weights, const int8_t *quants, dot_seed seed) {
    (void)seed;
    fvec v;
    for (int lane = 0; lane < OM_LANES; lane++) {
        int32_t sum = 0;
        for (int i = 4 * lane; i < 4 * lane + 4; i++)
            sum += weights.weight[i] * quants[i] + weights.weight[OM_BLOCK / 2 + i] * quants[OM_BLOCK / 2 + i];
        v.lane[lane] = (float)sum;
    }
    return v;
}

OM_INLINE xblock look_up_floats(const uint8_t *codes, const float *table) {
    float values[OM_BLOCK];
    for (int i = 0; i < OM_BLOCK / 2; i++) {
        const int at = (i & 15) + (i & 16) * 2;
        values[at] = table[codes[i] & 15];
        values[at + 16] = table[codes[i] >> 4];
    }
    xblock block;
    __builtin_memcpy(&block, values, sizeof block);
    return block;
}

OM_INLINE xblock x_nf4(const uint8_t *codes) { return look_up_floats(codes, om_nf4_values); }

OM_INLINE xblock x_mxfp4(const uint8_t *codes) {
    static const float values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                     -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    return look_up_floats(codes, values);
}

OM_INLINE xblock x_int8(const uint8_t *codes) {
    xblock block;
    for (int i = 0; i < OM_BLOCK; i++) block.v[i / OM_LANES].lane[i % OM_LANES] = (float)(int8_t)codes[i];
    return block;
}

OM_INLINE xblock x_bf16(const uint8_t *values) {
    xblock block;
    for (int i = 0; i < OM_BLOCK; i++) {
        uint16_t bits;
        __builtin_memcpy(&bits, values + 2 * i, 2);
        block.v[i / OM_LANES].lane[i % OM_LANES] = om_bf16_to_float(bits);
    }
    return block;
}

#include "elementwise.h"
#include "rows.h"

const om_isa om_isa_portable = {"portable", OM_ROW_TABLE, OM_ELEMENTWISE_TABLE};
