/* Vectors of 16 lanes: four registers of NEON. */
#include "vector.h"

#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

#define OM_HEADS 2
#define OM_AT_ONCE(heads) (4 / (heads))
#define OM_EACH_PART for (int n = 0; n < 4; n++)

typedef struct { float32x4_t part[4]; } vec;

OM_INLINE vec vec_load(const float *p) { return (vec){{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
OM_INLINE float32x4_t widen_bf16(uint16x4_t bits) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }
OM_INLINE vec vec_load_bf16(const uint16_t *p) {
    return (vec){{widen_bf16(vld1_u16(p)), widen_bf16(vld1_u16(p + 4)), widen_bf16(vld1_u16(p + 8)), widen_bf16(vld1_u16(p + 12))}};
}
OM_INLINE float32x4_t widen_fp16(uint16x4_t bits) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
OM_INLINE vec vec_load_fp16(const uint16_t *p) {
    return (vec){{widen_fp16(vld1_u16(p)), widen_fp16(vld1_u16(p + 4)), widen_fp16(vld1_u16(p + 8)), widen_fp16(vld1_u16(p + 12))}};
}
OM_INLINE void vec_store(float *p, vec v) { OM_UNROLL OM_EACH_PART vst1q_f32(p + 4 * n, v.part[n]); }
OM_INLINE vec vec_broadcast(float value) {
    const float32x4_t part = vdupq_n_f32(value);
    return (vec){{part, part, part, part}};
}
OM_INLINE vec vec_add(vec a, vec b) {
    OM_UNROLL OM_EACH_PART a.part[n] = vaddq_f32(a.part[n], b.part[n]);
    return a;
}
OM_INLINE vec vec_mul(vec a, vec b) {
    OM_UNROLL OM_EACH_PART a.part[n] = vmulq_f32(a.part[n], b.part[n]);
    return a;
}
OM_INLINE vec vec_fma(vec a, vec b, vec c) {
    OM_UNROLL OM_EACH_PART c.part[n] = vfmaq_f32(c.part[n], a.part[n], b.part[n]);
    return c;
}
OM_INLINE vec vec_greater(vec a, vec b) { /* vmaxq would pass a NaN on */
    OM_UNROLL OM_EACH_PART a.part[n] = vbslq_f32(vcgtq_f32(a.part[n], b.part[n]), a.part[n], b.part[n]);
    return a;
}
OM_INLINE float32x4_t add_parts(vec v) {
    return vaddq_f32(vaddq_f32(v.part[0], v.part[2]), vaddq_f32(v.part[1], v.part[3]));
}
OM_INLINE float vec_sum(vec v) {
    const float32x4_t four = add_parts(v);
    return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
OM_INLINE float32x4_t add_pairs(vec a, vec b) {
    const float32x4_t first = add_parts(a), second = add_parts(b);
    return vaddq_f32(vcombine_f32(vget_low_f32(first), vget_low_f32(second)),
                     vcombine_f32(vget_high_f32(first), vget_high_f32(second)));
}
OM_INLINE void vec_sums(const vec *v, float *sums) {
    vst1q_f32(sums, vpaddq_f32(add_pairs(v[0], v[1]), add_pairs(v[2], v[3])));
}

#include "vector_loops.h"

const om_vector_set om_vectors_neon = OM_VECTOR_TABLE;
#endif
