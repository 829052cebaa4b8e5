/* Vectors of 16 lanes: two registers of AVX2. */
#include "vector.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#define OM_HEADS 2
#define OM_AT_ONCE(heads) (4 / (heads))

typedef struct { __m256 low, high; } vec;

OM_INLINE vec vec_load(const float *p) { return (vec){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OM_INLINE __m256 widen_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
OM_INLINE vec vec_load_bf16(const uint16_t *p) { return (vec){widen_bf16(p), widen_bf16(p + 8)}; }
OM_INLINE __m256 widen_fp16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
OM_INLINE vec vec_load_fp16(const uint16_t *p) { return (vec){widen_fp16(p), widen_fp16(p + 8)}; }
OM_INLINE void vec_store(float *p, vec v) { _mm256_storeu_ps(p, v.low), _mm256_storeu_ps(p + 8, v.high); }
OM_INLINE vec vec_broadcast(float value) { return (vec){_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
OM_INLINE vec vec_add(vec a, vec b) { return (vec){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
OM_INLINE vec vec_mul(vec a, vec b) { return (vec){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
OM_INLINE vec vec_fma(vec a, vec b, vec c) {
    return (vec){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
OM_INLINE vec vec_greater(vec a, vec b) { return (vec){_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }

OM_INLINE float vec_sum(vec v) {
    const __m256 eight = _mm256_add_ps(v.low, v.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Lanes j and j + 4 of both. */
OM_INLINE __m256 add_halves(vec a, vec b) {
    const __m256 first = _mm256_add_ps(a.low, a.high), second = _mm256_add_ps(b.low, b.high);
    return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
}

OM_INLINE void vec_sums(const vec *v, float *sums) {
    const __m256d first = _mm256_castps_pd(add_halves(v[0], v[2])), second = _mm256_castps_pd(add_halves(v[1], v[3]));
    const __m256 two = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(first, second)),
                                     _mm256_castpd_ps(_mm256_unpackhi_pd(first, second)));
    const __m256 one = _mm256_add_ps(two, _mm256_permute_ps(two, 0xb1));
    _mm_storeu_ps(sums, _mm_shuffle_ps(_mm256_castps256_ps128(one), _mm256_extractf128_ps(one, 1), 0x88));
}

#include "vector_loops.h"

const om_vector_set om_vectors_avx2 = OM_VECTOR_TABLE;
#endif
