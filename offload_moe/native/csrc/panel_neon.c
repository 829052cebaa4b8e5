/* NEON: a slice is a quarter of a panel; the dot-product instructions where the compiler may use them. */
#include "panel.h"

#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

#define OM_SLICES 4
#define OM_SLICES_AT_ONCE(T) ((T) > 2 ? 2 : 4)
#define OM_SPAN 32

typedef float32x4_t slice_f;
typedef int32x4_t slice_i;

OM_INLINE slice_f sf_zero(void) { return vdupq_n_f32(0.0f); }
OM_INLINE slice_f sf_load(const float *p) { return vld1q_f32(p); }
OM_INLINE void sf_store(float *p, slice_f v) { vst1q_f32(p, v); }
OM_INLINE slice_f sf_broadcast(float value) { return vdupq_n_f32(value); }
OM_INLINE slice_f sf_add(slice_f a, slice_f b) { return vaddq_f32(a, b); }
OM_INLINE slice_f sf_mul(slice_f a, slice_f b) { return vmulq_f32(a, b); }
OM_INLINE slice_f sf_fma(slice_f a, slice_f b, slice_f c) { return vfmaq_f32(c, a, b); }
OM_INLINE slice_f sf_of_integers(slice_i v) { return vcvtq_f32_s32(v); }

OM_INLINE uint32x4_t widen_bytes(const uint8_t *bytes) {
    uint32_t four;
    __builtin_memcpy(&four, bytes, sizeof four);
    return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}

/* By the piece of the map, 31 minus the leading zeros of the distance from the middle (0 shares the piece of 1): bytes
 * 4 * piece + {0, 1, 2, 3} of the table. */
OM_INLINE slice_f map_codes(const uint8_t *bytes) {
    static const float starts[8] = {OM_MAP_STARTS_UP}, steps[8] = {OM_MAP_STEPS_UP};
    const int32x4_t centred = vsubq_s32(vreinterpretq_s32_u32(widen_bytes(bytes)), vdupq_n_s32(127));
    const uint32x4_t distance = vreinterpretq_u32_s32(vabsq_s32(centred));
    const uint32x4_t piece = vsubq_u32(vdupq_n_u32(31), vclzq_u32(vmaxq_u32(distance, vdupq_n_u32(1))));
    const uint8x16_t places = vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100u), piece, 0x04040404u));
    const uint8x16x2_t start_table = {{vld1q_u8((const uint8_t *)starts), vld1q_u8((const uint8_t *)(starts + 4))}};
    const uint8x16x2_t step_table = {{vld1q_u8((const uint8_t *)steps), vld1q_u8((const uint8_t *)(steps + 4))}};
    const slice_f start = vreinterpretq_f32_u8(vqtbl2q_u8(start_table, places));
    const slice_f step = vreinterpretq_f32_u8(vqtbl2q_u8(step_table, places));
    const uint32x4_t size = vreinterpretq_u32_f32(sf_fma(step, vcvtq_f32_u32(distance), start));
    return vreinterpretq_f32_u32(vorrq_u32(size, vandq_u32(vreinterpretq_u32_s32(centred), vdupq_n_u32(0x80000000u))));
}

OM_INLINE slice_f pick_steps(const om_panel_steps *steps, const int slice, int b) {
    const int at = slice * 4;
    const uint32x4_t is_first = vcgtq_s32(vld1q_s32(steps->crossing + at), vdupq_n_s32(b));
    return vbslq_f32(is_first, sf_load(steps->first + at), sf_load(steps->second + at));
}

OM_INLINE slice_f powers_of(slice_i v) {
    const uint32x4_t exponents = vreinterpretq_u32_s32(v);
    const uint32x4_t bits = vmaxq_u32(vshlq_n_u32(exponents, 23), vdupq_n_u32(0x00400000u));
    const uint32x4_t is_nan = vceqq_u32(exponents, vdupq_n_u32(255));
    return vreinterpretq_f32_u32(vbslq_u32(is_nan, vdupq_n_u32(0x7fc00000u), bits));
}

OM_INLINE slice_f powers_of_two(const uint8_t *bytes) { return powers_of(vreinterpretq_s32_u32(widen_bytes(bytes))); }

OM_INLINE int8x16_t weights_of(const int codec, uint8x16_t raw, const int high) {
    static const int8_t nf4_levels[16] = {OM_NF4_LEVELS}, mxfp4_levels[16] = {OM_MXFP4_LEVELS}, iq4_levels[16] = {OM_IQ4_LEVELS};
    const int is_iq4 = codec == OM_IQ4_NL || codec == OM_IQ4_XS;
    if (codec == OM_INT8) return vreinterpretq_s8_u8(raw);
    const int8x16_t table = vld1q_s8(codec == OM_NF4 ? nf4_levels : is_iq4 ? iq4_levels : mxfp4_levels);
    return vqtbl1q_s8(table, high ? vshrq_n_u8(raw, 4) : vandq_u8(raw, vdupq_n_u8(15)));
}

/* Of four rows: each one's four weights times the same four quants. */
OM_INLINE slice_i add_products(slice_i sum, int8x16_t weights, int8x16_t quants) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, weights, quants);
#else
    const int16x8_t first = vmull_s8(vget_low_s8(weights), vget_low_s8(quants)), second = vmull_high_s8(weights, quants);
    return vpadalq_s16(sum, vpaddq_s16(first, second)); /* pairs: 2 * 128 * 127 fits */
#endif
}

OM_INLINE int8x16_t broadcast_dword(const int8_t *quants) {
    return vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)quants));
}

OM_INLINE void group_sums(const int codec, const int T, const int H, const uint8_t *codes, int64_t ahead, const int8_t *quants,
                          const int32_t *corrections, slice_i *sums) {
    const int groups = codec == OM_MXFP4 ? 2 : 1, dwords = OM_ROW_DWORDS(codec) / groups, half = OM_BLOCK / groups / 2;
    const int parts = codec == OM_INT8 ? 1 : 2;
    (void)corrections;
    _Pragma("GCC unroll 16") for (int t = 0; t < T; t++)
        _Pragma("GCC unroll 16") for (int h = 0; h < H; h++) sums[t * OM_SLICES + h] = vdupq_n_s32(0);
    _Pragma("GCC unroll 16") for (int v = 0; v < dwords; v++)
        _Pragma("GCC unroll 16") for (int h = 0; h < H; h++) {
            const uint8x16_t raw = vld1q_u8((h == 0 ? om_line(codes + v * 64, ahead) : codes + v * 64) + h * 16);
            _Pragma("GCC unroll 16") for (int n = 0; n < parts; n++) {
                const int8x16_t weights = weights_of(codec, raw, n);
                _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) {
                    slice_i *sum = sums + t * OM_SLICES + h;
                    *sum = add_products(*sum, weights, broadcast_dword(quants + t * OM_BLOCK + n * half + v * 4));
                }
            }
        }
}

#define OM_LEVEL_OFFSET 0
typedef int8x16_t levels;

OM_INLINE slice_i si_load(const uint8_t *p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
OM_INLINE slice_i si_set(int32_t value) { return vdupq_n_s32(value); }
OM_INLINE slice_i si_and(slice_i a, slice_i b) { return vandq_s32(a, b); }
OM_INLINE slice_i si_or(slice_i a, slice_i b) { return vorrq_s32(a, b); }
OM_INLINE slice_i si_add(slice_i a, slice_i b) { return vaddq_s32(a, b); }
OM_INLINE slice_i si_mul(slice_i a, slice_i b) { return vmulq_s32(a, b); }
OM_INLINE slice_i si_left(slice_i a, int count) { return vshlq_s32(a, vdupq_n_s32(count)); }
OM_INLINE slice_i si_right(slice_i a, int count) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-count)));
}
OM_INLINE slice_i si_right_signed(slice_i a, int count) { return vshlq_s32(a, vdupq_n_s32(-count)); }
OM_INLINE slice_i si_words(const uint8_t *p) { return vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p)))); }
OM_INLINE slice_f sf_of_halves(slice_i v) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(vreinterpretq_u32_s32(v))));
}
OM_INLINE levels levels_of(const int codec, slice_i raw, const int high) { return weights_of(codec, vreinterpretq_u8_s32(raw), high); }
OM_INLINE slice_i dot_levels(slice_i sum, levels weights, const int8_t *q) { return add_products(sum, weights, broadcast_dword(q)); }
OM_INLINE slice_i dot_codes(slice_i sum, slice_i codes, const int8_t *q) {
    return add_products(sum, vreinterpretq_s8_s32(codes), broadcast_dword(q));
}

#include "panel_rows.h"

const om_panel_set om_panels_neon = OM_PANEL_TABLE;
#endif
