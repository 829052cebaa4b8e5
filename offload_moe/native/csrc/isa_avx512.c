/* AVX-512 with VNNI: one unit of 4-bit codes is one register, 128 weights. */
#include "levels.h"
#include "panel.h"
#include "vector_set.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512CD__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#if defined(__AVX512VBMI__)
#define OM_AVX512_TABLE om_isa_avx512_vbmi
#define OM_AVX512_PANELS om_panels_avx512_vbmi
#define OM_AVX512_NAME "avx512vbmi"
#else
#define OM_AVX512_TABLE om_isa_avx512
#define OM_AVX512_PANELS om_panels_avx512
#define OM_AVX512_NAME "avx512"
#endif

#define OM_LANES 16
#define OM_UNIT_BLOCKS 2
#define OM_EXACT_TILE 4

typedef __m512 fvec;
typedef __m512i x_raw;

OM_INLINE fvec fv_zero(void) { return _mm512_setzero_ps(); }
OM_INLINE fvec fv_load(const float *p) { return _mm512_loadu_ps(p); }
OM_INLINE void fv_store(float *p, fvec v) { _mm512_storeu_ps(p, v); }
OM_INLINE fvec fv_broadcast(float value) { return _mm512_set1_ps(value); }
OM_INLINE fvec fv_add(fvec a, fvec b) { return _mm512_add_ps(a, b); }
OM_INLINE fvec fv_mul(fvec a, fvec b) { return _mm512_mul_ps(a, b); }
OM_INLINE fvec fv_fma(fvec a, fvec b, fvec c) { return _mm512_fmadd_ps(a, b, c); }
OM_INLINE float fv_sum(fvec v) { return _mm512_reduce_add_ps(v); }

OM_INLINE __mmask16 first_lanes(int count) { return (__mmask16)((1u << count) - 1); }
OM_INLINE fvec fv_pick(fvec a, fvec b, int count) { return _mm512_mask_blend_ps(first_lanes(count), b, a); }
OM_INLINE fvec fv_load_some(const float *p, int count) {
    return count == OM_LANES ? fv_load(p) : _mm512_maskz_loadu_ps(first_lanes(count), p);
}

OM_INLINE __m512i widen_bytes(const uint8_t *bytes, int count) {
    const __m128i narrow = count == OM_LANES ? _mm_loadu_si128((const __m128i *)bytes)
                                             : _mm_maskz_loadu_epi8(first_lanes(count), bytes);
    return _mm512_cvtepu8_epi32(narrow);
}

OM_INLINE fvec powers_of_two(const uint8_t *bytes, int count) {
    const __m512i exponents = widen_bytes(bytes, count), bits = _mm512_slli_epi32(exponents, 23);
    const __m512i tiny = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(exponents, exponents), _mm512_set1_epi32(0x00400000));
    const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(exponents, _mm512_set1_epi32(255));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(tiny, is_nan, _mm512_set1_epi32(0x7fc00000)));
}

OM_INLINE __m512i load_raw(const int codec, const uint8_t *codes, const int num_blocks) {
    if (OM_UNIT_BLOCKS == num_blocks || codec == OM_INT8) return _mm512_loadu_si512(codes);
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)codes));
}

#define LANES_OF_2(a, b) {a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b}
#define LANES_OF_4(a, b, c, d) {a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d}

OM_INLINE fvec spread(const int codec, const float *scales, const int unit) {
    static const int32_t pairs[8][16] = {LANES_OF_2(0, 1), LANES_OF_2(2, 3),   LANES_OF_2(4, 5),   LANES_OF_2(6, 7),
                                         LANES_OF_2(8, 9), LANES_OF_2(10, 11), LANES_OF_2(12, 13), LANES_OF_2(14, 15)};
    static const int32_t fours[4][16] = {LANES_OF_4(0, 1, 2, 3), LANES_OF_4(4, 5, 6, 7), LANES_OF_4(8, 9, 10, 11),
                                         LANES_OF_4(12, 13, 14, 15)};
    if (codec == OM_INT8) return fv_broadcast(scales[unit]);
    return _mm512_permutexvar_ps(_mm512_loadu_si512(codec == OM_NF4 ? pairs[unit] : fours[unit]), fv_load(scales));
}

OM_INLINE fvec widen_signed(const uint8_t *codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
}

OM_INLINE fvec widen_bf16(const uint8_t *values) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)values)), 16));
}

OM_INLINE fvec x_vector(const int codec, x_raw raw, const uint8_t *codes, const int k) {
    if (codec == OM_INT8) return widen_signed(codes + 16 * k);
    if (codec == OM_FP32) return fv_load((const float *)codes + OM_LANES * k);
    if (codec == OM_BF16) return widen_bf16(codes + 32 * k);
    const fvec levels = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_setr_epi8(OM_MXFP4_LEVELS)));
    const fvec table = codec == OM_NF4 ? fv_load(om_nf4_values) : _mm512_mul_ps(levels, _mm512_set1_ps(1.0f / OM_MXFP4_UNIT));
    return _mm512_permutexvar_ps(_mm512_srli_epi32(raw, (unsigned)(4 * k)), table); /* ignores bits above the nibble */
}

#include "elementwise.h"
#include "rows.h"

const om_isa OM_AVX512_TABLE = {OM_AVX512_NAME, OM_ROW_TABLE, OM_ELEMENTWISE_TABLE, &OM_AVX512_PANELS, &om_vectors_avx512};
#endif
