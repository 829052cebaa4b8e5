/* NEON (AArch64); the dot-product instructions where the compiler may use them. */
#include "levels.h"
#include "om_kernels.h"
#include "signed_weights.h"

#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

#define OM_LANES 4
#define OM_FAST_ROWS(num_tokens) ((num_tokens) <= 4 ? 2 : 1)
#define OM_EXACT_ROWS 1
#define OM_EXACT_TILE 4

typedef float32x4_t fvec;
typedef struct { int8x16_t part[4]; } qblock; /* low nibbles of bytes 0..15 and 16..31, then the high ones */
typedef struct { fvec v[16]; } xblock;

OM_INLINE fvec fv_zero(void) { return vdupq_n_f32(0.0f); }
OM_INLINE fvec fv_load(const float *p) { return vld1q_f32(p); }
OM_INLINE void fv_store(float *p, fvec v) { vst1q_f32(p, v); }
OM_INLINE fvec fv_broadcast(float value) { return vdupq_n_f32(value); }
OM_INLINE fvec fv_add(fvec a, fvec b) { return vaddq_f32(a, b); }
OM_INLINE fvec fv_mul(fvec a, fvec b) { return vmulq_f32(a, b); }
OM_INLINE fvec fv_fma(fvec a, fvec b, fvec c) { return vfmaq_f32(c, a, b); }
OM_INLINE float fv_sum(fvec v) { return vaddvq_f32(v); }
OM_INLINE fvec fv_halves(float first, float second) { return vcombine_f32(vdup_n_f32(first), vdup_n_f32(second)); }

OM_INLINE qblock look_up_levels(const uint8_t *codes, const int8_t *levels) {
    const int8x16_t table = vld1q_s8(levels);
    const uint8x16_t mask = vdupq_n_u8(15), first = vld1q_u8(codes), second = vld1q_u8(codes + 16);
    return (qblock){{vqtbl1q_s8(table, vandq_u8(first, mask)), vqtbl1q_s8(table, vandq_u8(second, mask)),
                     vqtbl1q_s8(table, vshrq_n_u8(first, 4)), vqtbl1q_s8(table, vshrq_n_u8(second, 4))}};
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
    const int8_t *p = (const int8_t *)codes;
    return (qblock){{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}};
}

OM_INLINE int32x4_t add_products(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    return vpadalq_s16(sum, vmull_high_s8(a, b));
#endif
}

OM_INLINE fvec fv_dot(qblock w, const int8_t *quants, dot_seed seed) {
    (void)seed;
    const int32x4_t zero = vdupq_n_s32(0);
    const int32x4_t first = add_products(add_products(zero, w.part[0], vld1q_s8(quants)), w.part[2], vld1q_s8(quants + 32));
    const int32x4_t second =
        add_products(add_products(zero, w.part[1], vld1q_s8(quants + 16)), w.part[3], vld1q_s8(quants + 48));
    return vcvtq_f32_s32(vpaddq_s32(first, second));
}

/* 16 int8 -> 16 floats */
OM_INLINE void widen_int8(int8x16_t bytes, fvec *out) {
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    out[1] = vcvtq_f32_s32(vmovl_high_s16(low));
    out[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    out[3] = vcvtq_f32_s32(vmovl_high_s16(high));
}

/* A float table of 16 is 64 bytes: four-register byte lookups at 4 * index + {0, 1, 2, 3}. */
OM_INLINE void look_up_16(uint8x16x4_t table, uint8x16_t index, fvec *out) {
    const uint8x16_t base = vshlq_n_u8(index, 2);
    const uint8x16_t pairs[2] = {vzip1q_u8(base, base), vzip2q_u8(base, base)};
    const uint8x16_t byte = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100u));
    for (int i = 0; i < 4; i++) {
        const uint8x16_t pair = pairs[i / 2];
        const uint8x16_t quad = i % 2 ? vzip2q_u8(pair, pair) : vzip1q_u8(pair, pair);
        out[i] = vreinterpretq_f32_u8(vqtbl4q_u8(table, vaddq_u8(quad, byte)));
    }
}

OM_INLINE xblock look_up_floats(const uint8_t *codes, const float *values) {
    uint8x16x4_t table;
    for (int i = 0; i < 4; i++) table.val[i] = vld1q_u8((const uint8_t *)values + 16 * i);
    xblock block;
    for (int half = 0; half < 2; half++) {
        const uint8x16_t both = vld1q_u8(codes + 16 * half);
        look_up_16(table, vandq_u8(both, vdupq_n_u8(15)), block.v + 8 * half);
        look_up_16(table, vshrq_n_u8(both, 4), block.v + 8 * half + 4);
    }
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
    for (int i = 0; i < 4; i++) widen_int8(vld1q_s8((const int8_t *)codes + 16 * i), block.v + 4 * i);
    return block;
}

OM_INLINE xblock x_bf16(const uint8_t *values) {
    xblock block;
    for (int i = 0; i < 16; i++)
        block.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(values + 8 * i)), 16));
    return block;
}

#include "elementwise.h"
#include "rows.h"

const om_isa om_isa_neon = {"neon", OM_ROW_TABLE, OM_ELEMENTWISE_TABLE};
#endif
