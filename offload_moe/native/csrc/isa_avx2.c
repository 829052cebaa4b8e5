/* AVX2 with FMA: one unit is one block, 64 weights. */
#include "lanes8.h"
#include "levels.h"
#include "panel.h"
#include "vector_set.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#define OM_EXACT_TILE 4

typedef __m256 fvec;
typedef __m256i x_raw;

OM_INLINE fvec fv_zero(void) { return _mm256_setzero_ps(); }
OM_INLINE fvec fv_load(const float *p) { return _mm256_loadu_ps(p); }
OM_INLINE void fv_store(float *p, fvec v) { _mm256_storeu_ps(p, v); }
OM_INLINE fvec fv_broadcast(float value) { return _mm256_set1_ps(value); }
OM_INLINE fvec fv_add(fvec a, fvec b) { return _mm256_add_ps(a, b); }
OM_INLINE fvec fv_mul(fvec a, fvec b) { return _mm256_mul_ps(a, b); }
OM_INLINE fvec fv_fma(fvec a, fvec b, fvec c) { return _mm256_fmadd_ps(a, b, c); }
OM_INLINE fvec fv_halves(float first, float second) { return _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first)); }

OM_INLINE float fv_sum(fvec v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

OM_DEFINE_CHUNK_END

OM_INLINE const uint8_t *whole_bytes(const uint8_t *bytes, const int count, uint8_t *some) {
    if (count == OM_LANES) return bytes;
    for (int i = 0; i < OM_LANES; i++) some[i] = i < count ? bytes[i] : 0;
    return some;
}

OM_INLINE __m256i widen_bytes(const uint8_t *bytes, const int count) {
    uint8_t some[OM_LANES];
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)whole_bytes(bytes, count, some)));
}

OM_INLINE fvec powers_of_two(const uint8_t *bytes, const int count) {
    const __m256i exponents = widen_bytes(bytes, count), bits = _mm256_slli_epi32(exponents, 23);
    const __m256i is_tiny = _mm256_cmpeq_epi32(exponents, _mm256_setzero_si256());
    const __m256i is_nan = _mm256_cmpeq_epi32(exponents, _mm256_set1_epi32(255));
    const __m256i tiny = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x00400000), is_tiny);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(tiny, _mm256_set1_epi32(0x7fc00000), is_nan));
}

OM_INLINE __m256i load_bytes(const void *bytes) { return _mm256_loadu_si256((const __m256i *)bytes); }

OM_INLINE __m256i load_raw(const int codec, const uint8_t *codes, const int num_blocks) {
    (void)codec, (void)num_blocks;
    return load_bytes(codes);
}

/* 16 floats by a nibble: two 8-entry permutes by its lower three bits, its top bit chooses. */
OM_INLINE fvec permute_16(__m256i raw, const int k, fvec lower, fvec upper) {
    const __m256i index = _mm256_srli_epi32(raw, 4 * k);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index), _mm256_permutevar8x32_ps(upper, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(raw, 28 - 4 * k)));
}

OM_INLINE fvec x_vector(const int codec, x_raw raw, const uint8_t *codes, const int k) {
    if (codec == OM_INT8)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(codes + 8 * k))));
    const fvec positive = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
    if (codec == OM_MXFP4) return permute_16(raw, k, positive, _mm256_xor_ps(positive, _mm256_set1_ps(-0.0f)));
    return permute_16(raw, k, fv_load(om_nf4_values), fv_load(om_nf4_values + 8));
}

#include "elementwise.h"
#include "rows.h"

const om_isa om_isa_avx2 = {"avx2", OM_ROW_TABLE, OM_ELEMENTWISE_TABLE, &om_panels_avx2, &om_vectors_avx2};
/* Rows of weights in row order as AVX2 has them; panels with dot products, in two encodings. */
const om_isa om_isa_avx_vnni = {"avxvnni", OM_ROW_TABLE, OM_ELEMENTWISE_TABLE, &om_panels_avx_vnni, &om_vectors_avx2};
const om_isa om_isa_avx512_vl = {"avx512vl", OM_ROW_TABLE, OM_ELEMENTWISE_TABLE, &om_panels_avx512_vl, &om_vectors_avx2};
#endif
