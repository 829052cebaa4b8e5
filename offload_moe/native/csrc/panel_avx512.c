/* AVX-512 with VNNI: a slice is a panel, one register. */
#include "panel.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512CD__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#if defined(__AVX512VBMI__)
#define OM_AVX512_PANELS om_panels_avx512_vbmi
#else
#define OM_AVX512_PANELS om_panels_avx512
#endif

#define OM_SLICES 1
#define OM_SLICES_AT_ONCE(T) 1
#define OM_SPAN 0

typedef __m512 slice_f;
typedef __m512i slice_i;

OM_INLINE slice_f sf_zero(void) { return _mm512_setzero_ps(); }
OM_INLINE slice_f sf_load(const float *p) { return _mm512_loadu_ps(p); }
OM_INLINE void sf_store(float *p, slice_f v) { _mm512_storeu_ps(p, v); }
OM_INLINE slice_f sf_broadcast(float value) { return _mm512_set1_ps(value); }
OM_INLINE slice_f sf_add(slice_f a, slice_f b) { return _mm512_add_ps(a, b); }
OM_INLINE slice_f sf_mul(slice_f a, slice_f b) { return _mm512_mul_ps(a, b); }
OM_INLINE slice_f sf_fma(slice_f a, slice_f b, slice_f c) { return _mm512_fmadd_ps(a, b, c); }
OM_INLINE slice_f sf_of_integers(slice_i v) { return _mm512_cvtepi32_ps(v); }

OM_INLINE __m512i widen_bytes(const uint8_t *bytes) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes)); }

/* By the piece of the map that the distance from the middle, 1..128, lies on; 32 leading zeros for 0, 24 for 128. */
OM_INLINE slice_f map_codes(const uint8_t *bytes) {
    static const float starts[16] = {OM_MAP_START_0, 0, 0, 0, 0, 0, 0, 0, OM_MAP_STARTS_DOWN};
    static const float steps[16] = {OM_MAP_STEP_0, 0, 0, 0, 0, 0, 0, 0, OM_MAP_STEPS_DOWN};
    const __m512i centred = _mm512_sub_epi32(widen_bytes(bytes), _mm512_set1_epi32(127));
    const __m512i distance = _mm512_abs_epi32(centred), zeros = _mm512_lzcnt_epi32(distance);
    const slice_f start = _mm512_permutexvar_ps(zeros, sf_load(starts)), step = _mm512_permutexvar_ps(zeros, sf_load(steps));
    const slice_f size = sf_fma(step, _mm512_cvtepi32_ps(distance), start);
    const __m512i sign = _mm512_set1_epi32(INT32_MIN); /* size | (centred & sign) */
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(size), centred, sign, 0xf8));
}

OM_INLINE slice_f pick_steps(const om_panel_steps *steps, const int slice, int b) {
    (void)slice;
    const __mmask16 is_second = _mm512_cmple_epi32_mask(_mm512_loadu_si512(steps->crossing), _mm512_set1_epi32(b));
    return _mm512_mask_blend_ps(is_second, sf_load(steps->first), sf_load(steps->second));
}

OM_INLINE slice_f powers_of(slice_i exponents) {
    const __m512i bits = _mm512_max_epu32(_mm512_slli_epi32(exponents, 23), _mm512_set1_epi32(0x00400000));
    const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(exponents, _mm512_set1_epi32(255));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, is_nan, _mm512_set1_epi32(0x7fc00000)));
}

OM_INLINE slice_f powers_of_two(const uint8_t *bytes) { return powers_of(widen_bytes(bytes)); }

/* `index`: the nibble, other bits above it. Levels plus 128, as vpdpbusd multiplies unsigned weights with signed quants. */
OM_INLINE __m512i look_up(const int codec, __m512i index) {
    const __m128i signed_levels = codec == OM_NF4                             ? _mm_setr_epi8(OM_NF4_LEVELS)
                                  : codec == OM_IQ4_NL || codec == OM_IQ4_XS ? _mm_setr_epi8(OM_IQ4_LEVELS)
                                                                             : _mm_setr_epi8(OM_MXFP4_LEVELS);
    const __m512i table = _mm512_broadcast_i32x4(_mm_xor_si128(signed_levels, _mm_set1_epi8(-128)));
#if defined(__AVX512VBMI__)
    return _mm512_permutexvar_epi8(index, table); /* four copies of the table: two of the bits above are ignored thus */
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(index, _mm512_set1_epi8(15)));
#endif
}

OM_INLINE __m512i broadcast_dword(const void *p) {
    int32_t value;
    __builtin_memcpy(&value, p, sizeof value);
    return _mm512_set1_epi32(value);
}

/* Two chains of sums a token, where the registers hold them: one would wait for itself. */
OM_INLINE void group_sums(const int codec, const int T, const int H, const uint8_t *codes, int64_t ahead, const int8_t *quants,
                          const int32_t *corrections, slice_i *sums) {
    const int groups = codec == OM_MXFP4 ? 2 : 1, dwords = OM_ROW_DWORDS(codec) / groups, half = OM_BLOCK / groups / 2;
    slice_i others[OM_TILE];
    (void)H;
    _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) {
        sums[t] = broadcast_dword(corrections + t);
        others[t] = _mm512_setzero_si512();
    }
    _Pragma("GCC unroll 16") for (int v = 0; v < dwords; v++) {
        const __m512i raw = _mm512_loadu_si512(om_line(codes + v * 64, ahead));
        const __m512i low = codec == OM_INT8 ? _mm512_xor_si512(raw, _mm512_set1_epi8(-128)) : look_up(codec, raw);
        const __m512i high = codec == OM_INT8 ? low : look_up(codec, _mm512_srli_epi16(raw, 4));
        _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) {
            const int8_t *q = quants + t * OM_BLOCK + v * 4;
            slice_i *other = T <= 4 ? others + t : sums + t;
            if (codec == OM_INT8) {
                slice_i *sum = v % 2 ? other : sums + t;
                *sum = _mm512_dpbusd_epi32(*sum, low, broadcast_dword(q));
                continue;
            }
            sums[t] = _mm512_dpbusd_epi32(sums[t], low, broadcast_dword(q));
            *other = _mm512_dpbusd_epi32(*other, high, broadcast_dword(q + half));
            if (T > 4) OM_IN_TURN("+v", sums[t]);
        }
    }
    if (T <= 4)
        _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) sums[t] = _mm512_add_epi32(sums[t], others[t]);
}

#define OM_LEVEL_OFFSET 128
typedef __m512i levels;

OM_INLINE slice_i si_load(const void *p) { return _mm512_loadu_si512(p); }
OM_INLINE slice_i si_set(int32_t value) { return _mm512_set1_epi32(value); }
OM_INLINE slice_i si_and(slice_i a, slice_i b) { return _mm512_and_si512(a, b); }
OM_INLINE slice_i si_or(slice_i a, slice_i b) { return _mm512_or_si512(a, b); }
OM_INLINE slice_i si_add(slice_i a, slice_i b) { return _mm512_add_epi32(a, b); }
OM_INLINE slice_i si_mul(slice_i a, slice_i b) { return _mm512_mullo_epi32(a, b); }
OM_INLINE slice_i si_left(slice_i a, int count) { return _mm512_slli_epi32(a, (unsigned)count); }
OM_INLINE slice_i si_right(slice_i a, int count) { return _mm512_srli_epi32(a, (unsigned)count); }
OM_INLINE slice_i si_right_signed(slice_i a, int count) { return _mm512_srai_epi32(a, (unsigned)count); }
OM_INLINE slice_i si_words(const uint8_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
OM_INLINE slice_f sf_of_halves(slice_i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
OM_INLINE slice_i dot_codes(slice_i sum, slice_i codes, const int8_t *q) {
    return _mm512_dpbusd_epi32(sum, codes, broadcast_dword(q));
}
OM_INLINE levels levels_of(const int codec, slice_i raw, const int high) {
    if (codec == OM_INT8) return _mm512_xor_si512(raw, _mm512_set1_epi8(-128));
    return look_up(codec, high ? _mm512_srli_epi16(raw, 4) : raw);
}
OM_INLINE slice_i dot_levels(slice_i sum, levels weights, const int8_t *q) { return dot_codes(sum, weights, q); }

#include "panel_rows.h"

const om_panel_set OM_AVX512_PANELS = OM_PANEL_TABLE;
#endif
