/* Vectors of 16 lanes: one register of AVX-512. */
#include "vector.h"

#if defined(__AVX512F__)
#include <immintrin.h>

#define OM_HEADS 4
#define OM_AT_ONCE(heads) 4

typedef __m512 vec;

OM_INLINE vec vec_load(const float *p) { return _mm512_loadu_ps(p); }
OM_INLINE vec vec_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
OM_INLINE vec vec_load_fp16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
OM_INLINE void vec_store(float *p, vec v) { _mm512_storeu_ps(p, v); }
OM_INLINE vec vec_broadcast(float value) { return _mm512_set1_ps(value); }
OM_INLINE vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
OM_INLINE vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
OM_INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
OM_INLINE vec vec_greater(vec a, vec b) { return _mm512_max_ps(a, b); }

OM_INLINE float vec_sum(vec v) {
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), upper);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* The quarters of two vectors, then of all four, meet as lanes j and j + 8, and j and j + 4, do in vec_sum. */
OM_INLINE void vec_sums(const vec *v, float *sums) {
    const __m512 first = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
    const __m512 second = _mm512_add_ps(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
    const __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
    const __m512 two = _mm512_add_ps(four, _mm512_shuffle_ps(four, four, 0x4e));
    const __m512 one = _mm512_add_ps(two, _mm512_shuffle_ps(two, two, 0xb1));
    _mm_storeu_ps(sums, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, one)));
}

#include "vector_loops.h"

const om_vector_set om_vectors_avx512 = OM_VECTOR_TABLE;
#endif
