/* NEON (AArch64). */
#include "lanes8.h"
#include "levels.h"
#include "panel.h"
#include "vector_set.h"

#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

#define OM_EXACT_TILE 4

typedef struct { float32x4_t low, high; } fvec;
typedef uint32x4x2_t x_raw;

OM_INLINE fvec fv_zero(void) { return (fvec){vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}; }
OM_INLINE fvec fv_load(const float *p) { return (fvec){vld1q_f32(p), vld1q_f32(p + 4)}; }
OM_INLINE void fv_store(float *p, fvec v) { vst1q_f32(p, v.low), vst1q_f32(p + 4, v.high); }
OM_INLINE fvec fv_halves(float first, float second) { return (fvec){vdupq_n_f32(first), vdupq_n_f32(second)}; }
OM_INLINE fvec fv_broadcast(float value) { return fv_halves(value, value); }
OM_INLINE fvec fv_add(fvec a, fvec b) { return (fvec){vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
OM_INLINE fvec fv_mul(fvec a, fvec b) { return (fvec){vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
OM_INLINE fvec fv_fma(fvec a, fvec b, fvec c) {
    return (fvec){vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
OM_INLINE float fv_sum(fvec v) { return vaddvq_f32(vaddq_f32(v.low, v.high)); }

OM_DEFINE_CHUNK_END
OM_DEFINE_SCALES_BY_TABLE

OM_INLINE x_raw load_raw(const int codec, const uint8_t *codes, const int num_blocks) {
    (void)codec, (void)num_blocks;
    return (x_raw){{vreinterpretq_u32_u8(vld1q_u8(codes)), vreinterpretq_u32_u8(vld1q_u8(codes + 16))}};
}

/* Four floats by the nibbles at bit 4 k: byte lookups at 4 * nibble + {0, 1, 2, 3} in the 64 bytes of the table. */
OM_INLINE float32x4_t look_up_floats(uint8x16x4_t table, uint32x4_t raw, const int k) {
    const uint32x4_t nibbles = vandq_u32(vshlq_u32(raw, vdupq_n_s32(-4 * k)), vdupq_n_u32(15));
    const uint32x4_t places = vmlaq_n_u32(vdupq_n_u32(0x03020100u), nibbles, 0x04040404u);
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(places)));
}

OM_INLINE float32x4_t widen_bf16(const uint8_t *values) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(values)), 16));
}

OM_INLINE fvec x_vector(const int codec, x_raw raw, const uint8_t *codes, const int k) {
    static const float mxfp4_values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                           -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    if (codec == OM_INT8) {
        const int16x8_t wide = vmovl_s8(vld1_s8((const int8_t *)codes + 8 * k));
        return (fvec){vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
    }
    if (codec == OM_FP32) return fv_load((const float *)codes + OM_LANES * k);
    if (codec == OM_BF16) return (fvec){widen_bf16(codes + 16 * k), widen_bf16(codes + 16 * k + 8)};
    const uint8_t *values = (const uint8_t *)(codec == OM_NF4 ? om_nf4_values : mxfp4_values);
    const uint8x16x4_t table = {{vld1q_u8(values), vld1q_u8(values + 16), vld1q_u8(values + 32), vld1q_u8(values + 48)}};
    return (fvec){look_up_floats(table, raw.val[0], k), look_up_floats(table, raw.val[1], k)};
}

#include "elementwise.h"
#include "rows.h"

const om_isa om_isa_neon = {"neon", OM_ROW_TABLE, OM_ELEMENTWISE_TABLE, &om_panels_neon, &om_vectors_neon};
#endif
