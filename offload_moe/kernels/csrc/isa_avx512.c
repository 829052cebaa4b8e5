/* AVX-512 with VNNI: one block of 64 weights is one register. */
#include "levels.h"
#include "om_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#if defined(__AVX512VBMI__)
#define OM_AVX512_TABLE om_isa_avx512_vbmi
#define OM_AVX512_NAME "avx512vbmi"
#else
#define OM_AVX512_TABLE om_isa_avx512
#define OM_AVX512_NAME "avx512"
#endif

#define OM_LANES 16
#define OM_FAST_ROWS(num_tokens) 2
#define OM_EXACT_ROWS 2
#define OM_EXACT_TILE 4

typedef __m512 fvec;
typedef __m512i qblock;
typedef struct { fvec v[4]; } xblock;

OM_INLINE fvec fv_zero(void) { return _mm512_setzero_ps(); }
OM_INLINE fvec fv_load(const float *p) { return _mm512_loadu_ps(p); }
OM_INLINE void fv_store(float *p, fvec v) { _mm512_storeu_ps(p, v); }
OM_INLINE fvec fv_broadcast(float value) { return _mm512_set1_ps(value); }
OM_INLINE fvec fv_add(fvec a, fvec b) { return _mm512_add_ps(a, b); }
OM_INLINE fvec fv_mul(fvec a, fvec b) { return _mm512_mul_ps(a, b); }
OM_INLINE fvec fv_fma(fvec a, fvec b, fvec c) { return _mm512_fmadd_ps(a, b, c); }
OM_INLINE float fv_sum(fvec v) { return _mm512_reduce_add_ps(v); }

#define SECOND_HALF 0xf0f0 /* the lanes that sum a block's weights 32..63 */

OM_INLINE fvec fv_halves(float first, float second) {
    return _mm512_mask_broadcastss_ps(_mm512_set1_ps(first), SECOND_HALF, _mm_set_ss(second));
}

/* Each correction goes to one lane of its half. */
typedef __m512i dot_seed;
OM_INLINE dot_seed seed_one(const int32_t *correction) { return _mm512_zextsi128_si512(_mm_cvtsi32_si128(*correction)); }
OM_INLINE dot_seed seed_halves(const int32_t *first, const int32_t *second) {
    return _mm512_mask_set1_epi32(seed_one(first), 1 << 4, *second);
}

OM_INLINE __m512i widen_bytes(const uint8_t *bytes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
}

OM_INLINE fvec permute_32(const float *table, __m512i index) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
}

/* The map is odd around entry 127 but for its last entry, 1: half of it in registers, three times as fast as a gather. */
OM_INLINE fvec look_up_16_scales(const uint8_t *bytes) {
    const float *positive = om_dynamic_map + 127;
    const __m512i centred = _mm512_sub_epi32(widen_bytes(bytes), _mm512_set1_epi32(127)), index = _mm512_abs_epi32(centred);
    const __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    const __mmask16 bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
    const fvec low = _mm512_mask_blend_ps(bit5, permute_32(positive, index), permute_32(positive + 32, index));
    const fvec high = _mm512_mask_blend_ps(bit5, permute_32(positive + 64, index), permute_32(positive + 96, index));
    const __mmask16 is_last = _mm512_cmpeq_epi32_mask(index, _mm512_set1_epi32(128));
    const fvec size = _mm512_mask_blend_ps(is_last, _mm512_mask_blend_ps(bit6, low, high), _mm512_set1_ps(1.0f));
    const __m512i sign = _mm512_and_si512(centred, _mm512_set1_epi32(INT32_MIN));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(size), sign));
}

OM_INLINE void look_up_scales(const uint8_t *bytes, int64_t count, float *out) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) _mm512_storeu_ps(out + i, look_up_16_scales(bytes + i));
    for (; i < count; i++) out[i] = om_dynamic_map[bytes[i]];
}

/* Low nibbles in the lower half of the register, high nibbles in the upper one; other bits above them. */
OM_INLINE __m512i spread_nibbles(const uint8_t *codes) {
    const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
    const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)codes));
    return _mm512_srlv_epi32(both, shift);
}

OM_INLINE __m512i look_up_levels(const uint8_t *codes, __m128i levels) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_xor_si128(levels, _mm_set1_epi8(-128)));
#if defined(__AVX512VBMI__)
    return _mm512_permutexvar_epi8(spread_nibbles(codes), table); /* ignores what is above the nibble */
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(spread_nibbles(codes), _mm512_set1_epi8(15)));
#endif
}

OM_INLINE fvec fv_dot(qblock weights, const int8_t *quants, dot_seed seed) {
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(seed, weights, _mm512_loadu_si512(quants)));
}

OM_INLINE xblock look_up_floats(const uint8_t *codes, fvec table) {
    const __m512i first = widen_bytes(codes), second = widen_bytes(codes + 16); /* vpermps ignores bits above the index */
    return (xblock){{_mm512_permutexvar_ps(first, table), _mm512_permutexvar_ps(_mm512_srli_epi32(first, 4), table),
                     _mm512_permutexvar_ps(second, table), _mm512_permutexvar_ps(_mm512_srli_epi32(second, 4), table)}};
}

OM_INLINE fvec widen_signed(const uint8_t *codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
}

OM_INLINE fvec widen_bf16(const uint8_t *values) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)values)), 16));
}

OM_INLINE xblock x_int8(const uint8_t *codes) {
    return (xblock){{widen_signed(codes), widen_signed(codes + 16), widen_signed(codes + 32), widen_signed(codes + 48)}};
}

OM_INLINE xblock x_bf16(const uint8_t *values) {
    return (xblock){{widen_bf16(values), widen_bf16(values + 32), widen_bf16(values + 64), widen_bf16(values + 96)}};
}

OM_INLINE qblock q_nf4(const uint8_t *codes) { return look_up_levels(codes, _mm_setr_epi8(OM_NF4_LEVELS)); }
OM_INLINE qblock q_mxfp4(const uint8_t *codes) { return look_up_levels(codes, _mm_setr_epi8(OM_MXFP4_LEVELS)); }
OM_INLINE qblock q_int8(const uint8_t *codes) {
    return _mm512_xor_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8(-128));
}
OM_INLINE xblock x_nf4(const uint8_t *codes) { return look_up_floats(codes, _mm512_loadu_ps(om_nf4_values)); }
OM_INLINE xblock x_mxfp4(const uint8_t *codes) {
    const fvec levels = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_setr_epi8(OM_MXFP4_LEVELS)));
    return look_up_floats(codes, _mm512_mul_ps(levels, _mm512_set1_ps(1.0f / OM_MXFP4_UNIT)));
}

#include "elementwise.h"
#include "rows.h"

const om_isa OM_AVX512_TABLE = {OM_AVX512_NAME, OM_ROW_TABLE, OM_ELEMENTWISE_TABLE};
#endif
