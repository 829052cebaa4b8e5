/* AVX2 with FMA and F16C: one block of 64 weights is two registers. */
#include "levels.h"
#include "om_kernels.h"
#include "signed_weights.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#define OM_LANES 8
#define OM_FAST_ROWS(num_tokens) ((num_tokens) <= 2 ? 2 : 1)
#define OM_EXACT_ROWS 1
#define OM_EXACT_TILE 4

typedef __m256 fvec;
/* u8 times s8 with 8 bits on both sides saturates in vpmaddubsw; |x| times sign(w, x) cannot, as both stay within 127. */
typedef struct { __m256i low, high; } qblock;
typedef struct { fvec v[8]; } xblock;

OM_INLINE fvec fv_zero(void) { return _mm256_setzero_ps(); }
OM_INLINE fvec fv_load(const float *p) { return _mm256_loadu_ps(p); }
OM_INLINE void fv_store(float *p, fvec v) { _mm256_storeu_ps(p, v); }
OM_INLINE fvec fv_broadcast(float value) { return _mm256_set1_ps(value); }
OM_INLINE fvec fv_add(fvec a, fvec b) { return _mm256_add_ps(a, b); }
OM_INLINE fvec fv_mul(fvec a, fvec b) { return _mm256_mul_ps(a, b); }
OM_INLINE fvec fv_fma(fvec a, fvec b, fvec c) { return _mm256_fmadd_ps(a, b, c); }

OM_INLINE float fv_sum(fvec v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

OM_INLINE fvec fv_halves(float first, float second) { return _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first)); }

OM_INLINE __m256i load_bytes(const uint8_t *codes) { return _mm256_loadu_si256((const __m256i *)codes); }

OM_INLINE qblock look_up_levels(const uint8_t *codes, __m128i levels) {
    const __m256i table = _mm256_broadcastsi128_si256(levels), mask = _mm256_set1_epi8(15), both = load_bytes(codes);
    return (qblock){_mm256_shuffle_epi8(table, _mm256_and_si256(both, mask)),
                    _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both, 4), mask))};
}

OM_INLINE qblock q_nf4(const uint8_t *codes) { return look_up_levels(codes, _mm_setr_epi8(OM_NF4_LEVELS)); }
OM_INLINE qblock q_mxfp4(const uint8_t *codes) { return look_up_levels(codes, _mm_setr_epi8(OM_MXFP4_LEVELS)); }
OM_INLINE qblock q_int8(const uint8_t *codes) { return (qblock){load_bytes(codes), load_bytes(codes + 32)}; }

OM_INLINE __m256i dot_bytes(__m256i weights, const uint8_t *quants) {
    const __m256i signed_weights = _mm256_sign_epi8(weights, load_bytes(quants));
    return _mm256_madd_epi16(_mm256_maddubs_epi16(load_bytes(quants + OM_BLOCK), signed_weights), _mm256_set1_epi16(1));
}

OM_INLINE fvec fv_dot(qblock w, const int8_t *quants, dot_seed seed) {
    const uint8_t *bytes = (const uint8_t *)quants;
    (void)seed;
    return _mm256_cvtepi32_ps(_mm256_add_epi32(dot_bytes(w.low, bytes), dot_bytes(w.high, bytes + 32)));
}

/* 16 floats by a 4-bit index: two 8-entry permutes, the index's top bit chooses. */
OM_INLINE fvec permute_16(__m256i index, fvec lower, fvec upper) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index), _mm256_permutevar8x32_ps(upper, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

OM_INLINE __m256i widen_bytes(const uint8_t *bytes) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
}

OM_INLINE xblock look_up_floats(const uint8_t *codes, fvec lower, fvec upper) {
    xblock block;
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 2; i++) {
            const __m256i index = widen_bytes(codes + 16 * half + 8 * i);
            block.v[4 * half + i] = permute_16(index, lower, upper);
            block.v[4 * half + 2 + i] = permute_16(_mm256_srli_epi32(index, 4), lower, upper);
        }
    return block;
}

OM_INLINE xblock x_nf4(const uint8_t *codes) {
    return look_up_floats(codes, fv_load(om_nf4_values), fv_load(om_nf4_values + 8));
}

OM_INLINE xblock x_mxfp4(const uint8_t *codes) {
    const fvec positive = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
    return look_up_floats(codes, positive, _mm256_xor_ps(positive, _mm256_set1_ps(-0.0f)));
}

OM_INLINE xblock x_int8(const uint8_t *codes) {
    xblock block;
    for (int i = 0; i < 8; i++)
        block.v[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(codes + 8 * i))));
    return block;
}

OM_INLINE xblock x_bf16(const uint8_t *values) {
    xblock block;
    for (int i = 0; i < 8; i++)
        block.v[i] = _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(values + 16 * i))), 16));
    return block;
}

#include "elementwise.h"
#include "rows.h"

const om_isa om_isa_avx2 = {"avx2", OM_ROW_TABLE, OM_ELEMENTWISE_TABLE};
#endif
