/* Sets of 256-bit vectors: a slice is half a panel. `OM_DOT(sum, unsigned weights, signed quants)` where there is a VNNI form. */
#include <immintrin.h>

#define OM_SLICES 2
#define OM_SLICES_AT_ONCE(T) ((T) > 4 ? 1 : 2)
#define OM_SPAN 32 /* the latencies of decoding overlap only among themselves */

typedef __m256 slice_f;
typedef __m256i slice_i;

OM_INLINE slice_f sf_zero(void) { return _mm256_setzero_ps(); }
OM_INLINE slice_f sf_load(const float *p) { return _mm256_loadu_ps(p); }
OM_INLINE void sf_store(float *p, slice_f v) { _mm256_storeu_ps(p, v); }
OM_INLINE slice_f sf_broadcast(float value) { return _mm256_set1_ps(value); }
OM_INLINE slice_f sf_add(slice_f a, slice_f b) { return _mm256_add_ps(a, b); }
OM_INLINE slice_f sf_mul(slice_f a, slice_f b) { return _mm256_mul_ps(a, b); }
OM_INLINE slice_f sf_fma(slice_f a, slice_f b, slice_f c) { return _mm256_fmadd_ps(a, b, c); }
OM_INLINE slice_f sf_of_integers(slice_i v) { return _mm256_cvtepi32_ps(v); }

OM_INLINE __m256i widen_bytes(const uint8_t *bytes) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes)); }

/* By the piece of the map: the exponent of the distance from the middle, as a float. The permutes see its lower three bits,
 * which are those of the piece minus one; 0 shares the piece of 1. */
OM_INLINE slice_f map_codes(const uint8_t *bytes) {
    static const float starts[9] = {OM_MAP_STARTS_UP, OM_MAP_START_0}, steps[9] = {OM_MAP_STEPS_UP, OM_MAP_STEP_0};
    const __m256i centred = _mm256_sub_epi32(widen_bytes(bytes), _mm256_set1_epi32(127));
    const slice_f distance = _mm256_cvtepi32_ps(_mm256_abs_epi32(centred));
    const __m256i piece = _mm256_srli_epi32(_mm256_castps_si256(_mm256_max_ps(distance, _mm256_set1_ps(1.0f))), 23);
    const slice_f start = _mm256_permutevar8x32_ps(sf_load(starts + 1), piece);
    const slice_f size = sf_fma(_mm256_permutevar8x32_ps(sf_load(steps + 1), piece), distance, start);
    return _mm256_or_ps(size, _mm256_and_ps(_mm256_castsi256_ps(centred), _mm256_set1_ps(-0.0f)));
}

OM_INLINE slice_f pick_steps(const om_panel_steps *steps, const int slice, int b) {
    const int at = slice * 8;
    const __m256i crossing = _mm256_loadu_si256((const __m256i *)(steps->crossing + at));
    const __m256 is_first = _mm256_castsi256_ps(_mm256_cmpgt_epi32(crossing, _mm256_set1_epi32(b)));
    return _mm256_blendv_ps(sf_load(steps->second + at), sf_load(steps->first + at), is_first);
}

OM_INLINE slice_f powers_of(slice_i exponents) {
    const __m256i bits = _mm256_max_epu32(_mm256_slli_epi32(exponents, 23), _mm256_set1_epi32(0x00400000));
    const __m256i is_nan = _mm256_cmpeq_epi32(exponents, _mm256_set1_epi32(255));
    return _mm256_castsi256_ps(_mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), is_nan));
}

OM_INLINE slice_f powers_of_two(const uint8_t *bytes) { return powers_of(widen_bytes(bytes)); }

OM_INLINE __m256i broadcast_dword(const void *p) {
    int32_t value;
    __builtin_memcpy(&value, p, sizeof value);
    return _mm256_set1_epi32(value);
}

OM_INLINE __m256i load_bytes(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

/* The weights of low (`high` = 0) or high nibbles, or of int8 codes; plus 128 where there is OM_DOT. */
OM_INLINE __m256i weights_of(const int codec, __m256i raw, const int high) {
#if defined(OM_DOT)
    const __m128i flip = _mm_set1_epi8(-128);
#else
    const __m128i flip = _mm_setzero_si128();
#endif
    const __m128i signed_levels = codec == OM_NF4                             ? _mm_setr_epi8(OM_NF4_LEVELS)
                                  : codec == OM_IQ4_NL || codec == OM_IQ4_XS ? _mm_setr_epi8(OM_IQ4_LEVELS)
                                                                             : _mm_setr_epi8(OM_MXFP4_LEVELS);
    if (codec == OM_INT8) return _mm256_xor_si256(raw, _mm256_broadcastsi128_si256(flip));
    const __m256i nibbles = _mm256_and_si256(high ? _mm256_srli_epi16(raw, 4) : raw, _mm256_set1_epi8(15));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_xor_si128(signed_levels, flip)), nibbles);
}

#if defined(OM_DOT)
typedef __m256i panel_weights;

OM_INLINE panel_weights prepare_weights(__m256i weights) { return weights; }
OM_INLINE slice_i first_sum(const int32_t *correction) { return broadcast_dword(correction); }
OM_INLINE slice_i add_products(const int codec, slice_i sum, panel_weights w, __m256i quants) {
    return (void)codec, OM_DOT(sum, w, quants);
}
OM_INLINE slice_i whole_sum(const int codec, slice_i sum) { return (void)codec, sum; }
#else
/* |w| times sign(x, w): signed bytes on both sides would saturate, these cannot, as 2 * 128 * 127 fits. */
typedef struct { __m256i sizes, weights; } panel_weights;

OM_INLINE panel_weights prepare_weights(__m256i weights) { return (panel_weights){_mm256_abs_epi8(weights), weights}; }
OM_INLINE slice_i first_sum(const int32_t *correction) { return (void)correction, _mm256_setzero_si256(); }
OM_INLINE slice_i add_pairs(slice_i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

/* A group's sums of mxfp4 fit 16 bits: 32 / 2 * 12 * 127. */
OM_INLINE slice_i add_products(const int codec, slice_i sum, panel_weights w, __m256i quants) {
    const __m256i pairs = _mm256_maddubs_epi16(w.sizes, _mm256_sign_epi8(quants, w.weights));
    return codec == OM_MXFP4 ? _mm256_add_epi16(sum, pairs) : _mm256_add_epi32(sum, add_pairs(pairs));
}
OM_INLINE slice_i whole_sum(const int codec, slice_i sum) { return codec == OM_MXFP4 ? add_pairs(sum) : sum; }
#endif

OM_INLINE void group_sums(const int codec, const int T, const int H, const uint8_t *codes, int64_t ahead, const int8_t *quants,
                          const int32_t *corrections, slice_i *sums) {
    const int groups = codec == OM_MXFP4 ? 2 : 1, dwords = OM_ROW_DWORDS(codec) / groups, half = OM_BLOCK / groups / 2;
    const int parts = codec == OM_INT8 ? 1 : 2;
    _Pragma("GCC unroll 16") for (int t = 0; t < T; t++)
        _Pragma("GCC unroll 16") for (int h = 0; h < H; h++) sums[t * OM_SLICES + h] = first_sum(corrections + t);
    _Pragma("GCC unroll 16") for (int v = 0; v < dwords; v++) {
        panel_weights weights[OM_SLICES][2];
        _Pragma("GCC unroll 16") for (int h = 0; h < H; h++) {
            const __m256i raw = load_bytes((h == 0 ? om_line(codes + v * 64, ahead) : codes + v * 64) + h * 32);
            _Pragma("GCC unroll 16") for (int n = 0; n < parts; n++)
                weights[h][n] = prepare_weights(weights_of(codec, raw, n));
        }
        _Pragma("GCC unroll 16") for (int t = 0; t < T; t++)
            _Pragma("GCC unroll 16") for (int n = 0; n < parts; n++) {
                const __m256i q = broadcast_dword(quants + t * OM_BLOCK + n * half + v * 4);
                _Pragma("GCC unroll 16") for (int h = 0; h < H; h++) {
                    slice_i *sum = sums + t * OM_SLICES + h;
                    *sum = add_products(codec, *sum, weights[h][n], q);
                    OM_IN_TURN("+x", *sum);
                }
            }
    }
    _Pragma("GCC unroll 16") for (int t = 0; t < T; t++)
        _Pragma("GCC unroll 16") for (int h = 0; h < H; h++)
            sums[t * OM_SLICES + h] = whole_sum(codec, sums[t * OM_SLICES + h]);
}

typedef panel_weights levels;

OM_INLINE slice_i si_load(const uint8_t *p) { return load_bytes(p); }
OM_INLINE slice_i si_set(int32_t value) { return _mm256_set1_epi32(value); }
OM_INLINE slice_i si_and(slice_i a, slice_i b) { return _mm256_and_si256(a, b); }
OM_INLINE slice_i si_or(slice_i a, slice_i b) { return _mm256_or_si256(a, b); }
OM_INLINE slice_i si_add(slice_i a, slice_i b) { return _mm256_add_epi32(a, b); }
OM_INLINE slice_i si_mul(slice_i a, slice_i b) { return _mm256_mullo_epi32(a, b); }
OM_INLINE slice_i si_left(slice_i a, int count) { return _mm256_slli_epi32(a, count); }
OM_INLINE slice_i si_right(slice_i a, int count) { return _mm256_srli_epi32(a, count); }
OM_INLINE slice_i si_right_signed(slice_i a, int count) { return _mm256_srai_epi32(a, count); }
OM_INLINE slice_i si_words(const uint8_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
OM_INLINE slice_f sf_of_halves(slice_i v) {
    const __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff)), words = _mm256_packus_epi32(low, low);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08)));
}
OM_INLINE levels levels_of(const int codec, slice_i raw, const int high) { return prepare_weights(weights_of(codec, raw, high)); }
OM_INLINE slice_i dot_levels(slice_i sum, levels weights, const int8_t *q) {
    return add_products(OM_INT8, sum, weights, broadcast_dword(q));
}
#if defined(OM_DOT)
#define OM_LEVEL_OFFSET 128
OM_INLINE slice_i dot_codes(slice_i sum, slice_i codes, const int8_t *q) { return OM_DOT(sum, codes, broadcast_dword(q)); }
#else
#define OM_LEVEL_OFFSET 0
OM_INLINE slice_i dot_codes(slice_i sum, slice_i codes, const int8_t *q) {
    return _mm256_add_epi32(sum, add_pairs(_mm256_maddubs_epi16(codes, broadcast_dword(q)))); /* pairs: 2 * 63 * 127 fits */
}
#endif

#include "panel_rows.h"
