/* Panels of GGUF's types times 1..OM_TILE tokens: the loops, written once for every vector set.
 *
 * Beside what `panel_rows.h` uses, the including file defines before, on OM_SLICE_ROWS dwords in a slice_i:
 *   si_load, si_set (one dword), si_and, si_or, si_add, si_mul
 *   si_left, si_right, si_right_signed (by the same count each)
 *   si_words(p)                   OM_SLICE_ROWS 16-bit numbers
 *   sf_of_halves(v)               fp16 in the low halves of dwords
 *   powers_of(v)                  om_e8m0 of dwords
 *   dot_codes(sum, codes, q)      adds four codes of 0..63 of each row times the four quants at q
 *   levels, levels_of(codec, raw, high)
 *                                 weights of low or high nibbles, or of OM_INT8 codes, as `dot_levels` takes them
 *   dot_levels(sum, levels, q)    the same with signed weights plus OM_LEVEL_OFFSET */
#include "gguf_types.h"

#define OM_TOKENS_AT_ONCE 4 /* as many as most sets have registers for */

/* A slice of a chunk, and the first of the tokens that are multiplied with it. sums: 16-bit sums of the quants of 16 columns. */
typedef struct {
    const uint8_t *dwords, *sides;
    int64_t ahead;
    const int8_t *quants;
    const float *scales;
    const int32_t *sums;
    int stride; /* tokens of the tile */
} gguf_part;

OM_INLINE slice_i line(const gguf_part *part, int i) { return si_load(om_line(part->dwords + i * 64, part->ahead)); }
OM_INLINE slice_i bytes_of(slice_i v, const int mask) { return si_and(v, si_set(mask * 0x01010101)); }
/* Left, or right where the count is negative. */
OM_INLINE slice_i shifted(slice_i v, int left) { return left >= 0 ? si_left(v, left) : si_right(v, -left); }
OM_INLINE slice_i byte_of(slice_i v, int j) { return si_and(si_right(v, 8 * j), si_set(255)); }
OM_INLINE slice_i signed_byte_of(slice_i v, int j) { return si_right_signed(si_left(v, 24 - 8 * j), 24); }
/* Of a block's columns 16 * j on; of 32 columns. */
OM_INLINE int32_t sum_of(const gguf_part *part, int b, int j, int t) { return part->sums[(b * OM_SUMS + j) * part->stride + t]; }
OM_INLINE int32_t wide_sum(const gguf_part *part, int b, int j, int t) {
    return sum_of(part, b, 2 * j, t) + sum_of(part, b, 2 * j + 1, t);
}
OM_INLINE const int8_t *quants_of(const gguf_part *part, int b, int t) { return part->quants + (b * part->stride + t) * OM_BLOCK; }
OM_INLINE slice_f scale_at(const gguf_part *part, int b, int t) { return sf_broadcast(part->scales[b * part->stride + t]); }

/* What the codes of a type exceed its weights by, as these functions multiply them. */
OM_INLINE int offset_of(const int codec) {
    switch (codec) {
    case OM_Q4_0: return 8;
    case OM_Q5_0: return 16;
    case OM_Q8_0: case OM_IQ4_NL: case OM_IQ4_XS: case OM_GGUF_MXFP4: return OM_LEVEL_OFFSET;
    case OM_Q6_K: return 32;
    case OM_Q3_K: return 4;
    default: return 0;
    }
}

OM_INLINE int has_levels(const int codec) { return codec == OM_IQ4_NL || codec == OM_IQ4_XS || codec == OM_GGUF_MXFP4; }

/* The dwords that 32 weights' nibbles follow. */
OM_INLINE int flat_header(const int codec) { return om_chunk_dwords(codec) - 8; }

/* Bits 4 v to 4 v + 3, as 16 in four bytes. */
OM_INLINE slice_i fifth_bits(slice_i bits, const int v) {
    const slice_i four = si_and(si_right(bits, 4 * v), si_set(15));
    return si_left(bytes_of(si_mul(four, si_set(0x00204081)), 1), 4);
}

/* Sums of 32 columns, j of two in a block. */
OM_INLINE void flat_sums(const int codec, const int N, const gguf_part *part, const int j, slice_i *sums) {
    OM_UNROLL for (int t = 0; t < N; t++) sums[t] = si_set(-offset_of(codec) * wide_sum(part, 0, j, t));
    if (codec == OM_Q8_0) {
        OM_UNROLL for (int v = 0; v < 8; v++) {
            const levels weights = levels_of(OM_INT8, line(part, 1 + 8 * j + v), 0);
            OM_UNROLL for (int t = 0; t < N; t++) sums[t] = dot_levels(sums[t], weights, quants_of(part, 0, t) + 32 * j + 4 * v);
        }
        return;
    }
    const int is_wide = codec == OM_Q5_0 || codec == OM_Q5_1;
    const slice_i fifth = is_wide ? line(part, flat_header(codec) - 2 + j) : si_set(0);
    OM_UNROLL for (int v = 0; v < 4; v++) {
        const slice_i raw = line(part, flat_header(codec) + 4 * j + v);
        if (has_levels(codec)) {
            const levels low = levels_of(codec, raw, 0), high = levels_of(codec, raw, 1);
            OM_UNROLL for (int t = 0; t < N; t++) {
                const int8_t *q = quants_of(part, 0, t) + 32 * j + 4 * v;
                sums[t] = dot_levels(dot_levels(sums[t], low, q), high, q + 16);
            }
            continue;
        }
        slice_i low = bytes_of(raw, 15), high = bytes_of(si_right(raw, 4), 15);
        if (is_wide) low = si_or(low, fifth_bits(fifth, v)), high = si_or(high, fifth_bits(fifth, 4 + v));
        OM_UNROLL for (int t = 0; t < N; t++) {
            const int8_t *q = quants_of(part, 0, t) + 32 * j + 4 * v;
            sums[t] = dot_codes(dot_codes(sums[t], low, q), high, q + 16);
        }
    }
}

/* A block of 64 columns into the segment, which `is_first` begins. */
OM_INLINE void add_flat(const int codec, const int N, const gguf_part *part, const int is_first, slice_f *segment) {
    OM_UNROLL for (int j = 0; j < 2; j++) {
        slice_i sums[OM_TOKENS_AT_ONCE];
        flat_sums(codec, N, part, j, sums);
        const slice_i header = codec == OM_GGUF_MXFP4 ? si_words(part->sides) : line(part, om_has_mins(codec) ? j : 0);
        const slice_f step = codec == OM_GGUF_MXFP4  ? powers_of(byte_of(header, j))
                             : om_has_mins(codec)    ? sf_of_halves(header)
                                                     : sf_of_halves(si_right(header, 16 * j));
        OM_UNROLL for (int t = 0; t < N; t++) {
            slice_f *target = segment + t * OM_SLICES;
            const slice_f sum = sf_of_integers(sums[t]), product = sf_mul(step, scale_at(part, 0, t));
            *target = is_first && j == 0 ? sf_mul(sum, product) : sf_fma(sum, product, *target);
            if (!om_has_mins(codec)) continue;
            const slice_f least = sf_mul(sf_of_halves(si_right(header, 16)), scale_at(part, 0, t));
            *target = sf_fma(sf_broadcast((float)wide_sum(part, 0, j, t)), least, *target);
        }
    }
}

/* Six-bit scales and minima of sub-blocks 0..3 and 4..7, one in a byte. */
OM_INLINE void unpack_q45(const gguf_part *part, slice_i *scales, slice_i *mins) {
    const slice_i first = line(part, 1), second = line(part, 2), third = line(part, 3);
    scales[0] = bytes_of(first, 63), mins[0] = bytes_of(second, 63);
    scales[1] = si_or(bytes_of(third, 15), bytes_of(si_right(first, 2), 48));
    mins[1] = si_or(bytes_of(si_right(third, 4), 15), bytes_of(si_right(second, 2), 48));
}

OM_INLINE slice_i iq4_scale(slice_i header, slice_i low, int j) {
    const slice_i high = si_and(shifted(header, 4 - 16 - 2 * j), si_set(48)); /* two bits of the upper half */
    return si_add(si_or(si_and(si_right(low, 4 * j), si_set(15)), high), si_set(-32));
}

/* Sums of columns 64 c to 64 c + 31, and of the 32 behind them. */
OM_INLINE void wide_sums(const int codec, const int N, const gguf_part *part, int c, slice_i *first, slice_i *second) {
    OM_UNROLL for (int t = 0; t < N; t++) {
        first[t] = codec == OM_IQ4_XS ? si_set(-OM_LEVEL_OFFSET * wide_sum(part, c, 0, t)) : si_set(0);
        second[t] = codec == OM_IQ4_XS ? si_set(-OM_LEVEL_OFFSET * wide_sum(part, c, 1, t)) : si_set(0);
    }
    OM_UNROLL for (int v = 0; v < 8; v++) {
        if (codec == OM_IQ4_XS) {
            const slice_i raw = line(part, 2 + c * 8 + v);
            const levels low = levels_of(codec, raw, 0), high = levels_of(codec, raw, 1);
            OM_UNROLL for (int t = 0; t < N; t++) {
                const int8_t *q = quants_of(part, c, t) + v / 4 * 32 + v % 4 * 4;
                slice_i *sum = v < 4 ? first + t : second + t;
                *sum = dot_levels(dot_levels(*sum, low, q), high, q + 16);
            }
            continue;
        }
        const slice_i raw = line(part, codec == OM_Q4_K ? 4 + c * 8 + v : c ? 12 + c * 8 + v : 5 + 2 * v);
        slice_i low = bytes_of(raw, 15), high = bytes_of(si_right(raw, 4), 15);
        if (codec == OM_Q5_K) {
            const slice_i fifth = line(part, 4 + 2 * v);
            low = si_or(low, bytes_of(shifted(fifth, 4 - 2 * c), 16)), high = si_or(high, bytes_of(shifted(fifth, 3 - 2 * c), 16));
        }
        OM_UNROLL for (int t = 0; t < N; t++) {
            const int8_t *q = quants_of(part, c, t) + 4 * v;
            first[t] = dot_codes(first[t], low, q);
            second[t] = dot_codes(second[t], high, q + 32);
        }
    }
}

/* What a superblock adds to so many tokens: scaled sums of codes, and of minima. */
typedef struct {
    slice_i scales[4], mins[4]; /* one in a byte */
    slice_f codes[OM_TOKENS_AT_ONCE], least[OM_TOKENS_AT_ONCE];
} superblock;

/* Columns 64 c to 64 c + 63 of a type with sub-blocks of 32. */
OM_INLINE void add_group_of_32(const int codec, const int N, const gguf_part *part, int c, slice_i header, superblock *to) {
    slice_i first[OM_TOKENS_AT_ONCE], second[OM_TOKENS_AT_ONCE];
    wide_sums(codec, N, part, c, first, second);
    const int even = c % 2 * 2, odd = even + 1;
    const slice_i s0 = om_has_mins(codec) ? byte_of(to->scales[c / 2], even) : iq4_scale(header, line(part, 1), 2 * c);
    const slice_i s1 = om_has_mins(codec) ? byte_of(to->scales[c / 2], odd) : iq4_scale(header, line(part, 1), 2 * c + 1);
    OM_UNROLL for (int t = 0; t < N; t++) {
        const slice_f scale = scale_at(part, c, t);
        to->codes[t] = sf_fma(sf_of_integers(si_add(si_mul(first[t], s0), si_mul(second[t], s1))), scale, to->codes[t]);
        if (!om_has_mins(codec)) continue;
        const slice_i m0 = si_mul(byte_of(to->mins[c / 2], even), si_set(-wide_sum(part, c, 0, t)));
        const slice_i m1 = si_mul(byte_of(to->mins[c / 2], odd), si_set(-wide_sum(part, c, 1, t)));
        to->least[t] = sf_fma(sf_of_integers(si_add(m0, m1)), scale, to->least[t]);
    }
}

/* With `header`, whose low halves are the scale of all codes and, with minima, whose high halves are that of those. */
OM_INLINE void add_superblock(const int codec, const int N, slice_i header, const superblock *from, slice_f *totals) {
    OM_UNROLL for (int t = 0; t < N; t++) {
        slice_f *total = totals + t * OM_SLICES;
        *total = sf_fma(from->codes[t], sf_of_halves(header), *total);
        if (om_has_mins(codec)) *total = sf_fma(from->least[t], sf_of_halves(si_right(header, 16)), *total);
    }
}

/* Q4_K, Q5_K, IQ4_XS: eight sub-blocks of 32. */
OM_INLINE void add_of_32(const int codec, const int N, const gguf_part *part, slice_f *totals) {
    const slice_i header = line(part, 0);
    superblock sums;
    if (om_has_mins(codec)) unpack_q45(part, sums.scales, sums.mins);
    OM_UNROLL for (int t = 0; t < N; t++) sums.codes[t] = sums.least[t] = sf_zero();
    if (N == 1) /* shifts by constants; for more tokens the code would be four times as long for little */
        OM_UNROLL for (int c = 0; c < 4; c++) add_group_of_32(codec, N, part, c, header, &sums);
    else
        for (int c = 0; c < 4; c++) add_group_of_32(codec, N, part, c, header, &sums);
    add_superblock(codec, N, header, &sums, totals);
}

/* Scales (and minima) of sub-blocks 4 i to 4 i + 3, one in a byte: of Q3_K plus 32. */
OM_INLINE void unpack_of_16(const int codec, const gguf_part *part, slice_i *scales, slice_i *mins) {
    if (codec == OM_Q3_K) {
        const slice_i first = line(part, 0), second = line(part, 1), high = line(part, 2);
        scales[0] = si_or(bytes_of(first, 15), bytes_of(si_left(high, 4), 48));
        scales[1] = si_or(bytes_of(second, 15), bytes_of(si_left(high, 2), 48));
        scales[2] = si_or(bytes_of(si_right(first, 4), 15), bytes_of(high, 48));
        scales[3] = si_or(bytes_of(si_right(second, 4), 15), bytes_of(si_right(high, 2), 48));
        return;
    }
    OM_UNROLL for (int i = 0; i < 4; i++) {
        const slice_i raw = line(part, codec == OM_Q2_K ? 1 + i : i);
        scales[i] = codec == OM_Q2_K ? bytes_of(raw, 15) : raw;
        mins[i] = bytes_of(si_right(raw, 4), 15);
    }
}

OM_INLINE slice_i scale_of_16(const int codec, const slice_i *scales, int s) {
    if (codec == OM_Q6_K) return signed_byte_of(scales[s / 4], s % 4);
    const slice_i scale = byte_of(scales[s / 4], s % 4);
    return codec == OM_Q3_K ? si_add(scale, si_set(-32)) : scale;
}

/* Columns 32 n + 4 v to + 3 of half g, n = 0..3. */
OM_INLINE void codes_of_16(const int codec, const gguf_part *part, int g, int v, slice_i *codes) {
    if (codec == OM_Q6_K) {
        const int at = 4 + (g * 8 + v) * 3;
        const slice_i even = line(part, at), odd = line(part, at + 1), high = line(part, at + 2);
        codes[0] = si_or(bytes_of(even, 15), bytes_of(si_left(high, 4), 48));
        codes[1] = si_or(bytes_of(odd, 15), bytes_of(si_left(high, 2), 48));
        codes[2] = si_or(bytes_of(si_right(even, 4), 15), bytes_of(high, 48));
        codes[3] = si_or(bytes_of(si_right(odd, 4), 15), bytes_of(si_right(high, 2), 48));
        return;
    }
    const slice_i low = line(part, codec == OM_Q2_K ? 5 + g * 8 + v : g ? 19 + v : 4 + 2 * v);
    const slice_i high = codec == OM_Q3_K ? line(part, 3 + 2 * v) : si_set(0);
    OM_UNROLL for (int n = 0; n < 4; n++) {
        codes[n] = bytes_of(si_right(low, 2 * n), 3);
        if (codec == OM_Q3_K) codes[n] = si_or(codes[n], bytes_of(shifted(high, 2 - 4 * g - n), 4));
    }
}

/* Scaled sums of two blocks, 2 g and 2 g + 1. */
OM_INLINE void half_sums(const int codec, const int N, const gguf_part *part, int g, const slice_i *scales,
                         slice_i sums[2][OM_TOKENS_AT_ONCE]) {
    OM_UNROLL for (int u = 0; u < 2; u++) {
        slice_i raw[4][OM_TOKENS_AT_ONCE];
        OM_UNROLL for (int n = 0; n < 4; n++) OM_UNROLL for (int t = 0; t < N; t++)
            raw[n][t] = si_set(-offset_of(codec) * sum_of(part, 2 * g + n / 2, 2 * (n % 2) + u, t));
        OM_UNROLL for (int v = 4 * u; v < 4 * u + 4; v++) {
            slice_i codes[4];
            codes_of_16(codec, part, g, v, codes);
            OM_UNROLL for (int n = 0; n < 4; n++) OM_UNROLL for (int t = 0; t < N; t++)
                raw[n][t] = dot_codes(raw[n][t], codes[n], quants_of(part, 2 * g + n / 2, t) + 32 * (n % 2) + 4 * v);
        }
        OM_UNROLL for (int n = 0; n < 4; n++) {
            const slice_i scale = scale_of_16(codec, scales, 8 * g + 2 * n + u);
            OM_UNROLL for (int t = 0; t < N; t++) {
                const slice_i product = si_mul(raw[n][t], scale);
                sums[n / 2][t] = u == 0 && n % 2 == 0 ? product : si_add(sums[n / 2][t], product);
            }
        }
    }
}

/* Blocks 2 g and 2 g + 1 of a type with sub-blocks of 16. */
OM_INLINE void add_half_of_16(const int codec, const int N, const gguf_part *part, int g, superblock *to) {
    slice_i sums[2][OM_TOKENS_AT_ONCE];
    half_sums(codec, N, part, g, to->scales, sums);
    OM_UNROLL for (int i = 0; i < 2; i++) OM_UNROLL for (int t = 0; t < N; t++) {
        const int c = 2 * g + i;
        const slice_f scale = scale_at(part, c, t);
        to->codes[t] = sf_fma(sf_of_integers(sums[i][t]), scale, to->codes[t]);
        if (!om_has_mins(codec)) continue;
        slice_i sum = si_mul(byte_of(to->mins[c], 0), si_set(-sum_of(part, c, 0, t)));
        OM_UNROLL for (int j = 1; j < 4; j++) sum = si_add(sum, si_mul(byte_of(to->mins[c], j), si_set(-sum_of(part, c, j, t))));
        to->least[t] = sf_fma(sf_of_integers(sum), scale, to->least[t]);
    }
}

/* Q6_K, Q3_K, Q2_K: sixteen sub-blocks of 16. */
OM_INLINE void add_of_16(const int codec, const int N, const gguf_part *part, slice_f *totals) {
    superblock sums;
    unpack_of_16(codec, part, sums.scales, sums.mins);
    OM_UNROLL for (int t = 0; t < N; t++) sums.codes[t] = sums.least[t] = sf_zero();
    if (N == 1)
        OM_UNROLL for (int g = 0; g < 2; g++) add_half_of_16(codec, N, part, g, &sums);
    else
        for (int g = 0; g < 2; g++) add_half_of_16(codec, N, part, g, &sums);
    add_superblock(codec, N, om_has_sides(codec) ? si_words(part->sides) : line(part, 0), &sums, totals);
}

/* Chunk k times N tokens of the tile, from token `first` on. */
OM_INLINE void add_chunk(const int codec, const int N, const panel_place *place, const om_panel_tile *tile, int first, int64_t k,
                         const int is_first, slice_f *totals) {
    const int blocks = OM_CHUNK_COLUMNS(codec) / OM_BLOCK, stride = N < OM_TOKENS_AT_ONCE ? N : tile->num_tokens;
    const uint8_t *chunk = place->codes + k * om_chunk_dwords(codec) * 64;
    OM_UNROLL for (int h = 0; h < OM_SLICES; h++) {
        const gguf_part part = {.dwords = chunk + h * OM_SLICE_ROWS * 4,
                                .sides = place->scales + (k * OM_PANEL + h * OM_SLICE_ROWS) * OM_SIDE_BYTES,
                                .ahead = place->ahead,
                                .quants = tile->quants + (k * blocks * stride + first) * OM_BLOCK,
                                .scales = tile->scales + k * blocks * stride + first,
                                .sums = tile->corrections + k * blocks * OM_SUMS * stride + first,
                                .stride = stride};
        if (!OM_IS_OF_256(codec)) add_flat(codec, N, &part, is_first, totals + h);
        else if (codec == OM_Q4_K || codec == OM_Q5_K || codec == OM_IQ4_XS) add_of_32(codec, N, &part, totals + h);
        else add_of_16(codec, N, &part, totals + h);
    }
}

OM_INLINE void whole_gguf_panel(const int codec, const int N, const panel_place *place, const om_panel_tile *tile, int first,
                                float *results, int64_t stride) {
    const int64_t chunks = place->w->blocks * OM_BLOCK / OM_CHUNK_COLUMNS(codec);
    slice_f totals[OM_TOKENS_AT_ONCE * OM_SLICES], segment[OM_TOKENS_AT_ONCE * OM_SLICES];
    OM_UNROLL for (int i = 0; i < N * OM_SLICES; i++) totals[i] = sf_zero();
    for (int64_t k = 0; k < chunks; k++) {
        if (OM_IS_OF_256(codec)) {
            add_chunk(codec, N, place, tile, first, k, 0, totals);
            continue;
        }
        add_chunk(codec, N, place, tile, first, k, 1, segment);
        if (++k < chunks) add_chunk(codec, N, place, tile, first, k, 0, segment);
        add_segment(N, totals, segment);
    }
    const slice_f unit = sf_broadcast(codec == OM_GGUF_MXFP4 ? 1.0f / OM_MXFP4_UNIT : 1.0f);
    OM_UNROLL for (int t = 0; t < N; t++) OM_UNROLL for (int h = 0; h < OM_SLICES; h++) {
        const slice_f total = totals[t * OM_SLICES + h];
        sf_store(results + (first + t) * stride + h * OM_SLICE_ROWS, codec == OM_GGUF_MXFP4 ? sf_mul(total, unit) : total);
    }
}

/* Whole panels, each N tokens after the other: what is read twice is in the cache. */
OM_INLINE void gguf_panels(const int codec, const int N, const om_weights *w, int64_t first_row, int64_t num_rows,
                           const om_panel_tile *tile, float *results, int64_t stride) {
    panel_place place = {.w = w, .ahead = om_panel_ahead(tile->num_tokens)};
    const int64_t side_bytes = w->blocks * OM_BLOCK / OM_CHUNK_COLUMNS(codec) * OM_SIDE_BYTES;
    int64_t r = 0;
    for (; r + OM_PANEL <= num_rows; r += OM_PANEL) {
        place.codes = w->codes + (first_row + r) * w->row_bytes;
        place.scales = w->scales + (first_row + r) * side_bytes;
        for (int t = 0; t < tile->num_tokens; t += N) whole_gguf_panel(codec, N, &place, tile, t, results + r, stride);
    }
    if (r < num_rows) om_portable_panel(w, first_row + r, (int)(num_rows - r), tile, results + r, stride);
}

#define OM_DEFINE_GGUF(NAME, CODEC) \
    static void NAME(const om_weights *w, int64_t first_row, int64_t num_rows, const om_panel_tile *tile, float *results, \
                     int64_t stride) { \
        if (tile->num_tokens == 1) gguf_panels(CODEC, 1, w, first_row, num_rows, tile, results, stride); \
        else if (tile->num_tokens == 2) gguf_panels(CODEC, 2, w, first_row, num_rows, tile, results, stride); \
        else gguf_panels(CODEC, OM_TOKENS_AT_ONCE, w, first_row, num_rows, tile, results, stride); \
    }

OM_DEFINE_GGUF(panels_q4_0, OM_Q4_0)
OM_DEFINE_GGUF(panels_q4_1, OM_Q4_1)
OM_DEFINE_GGUF(panels_q5_0, OM_Q5_0)
OM_DEFINE_GGUF(panels_q5_1, OM_Q5_1)
OM_DEFINE_GGUF(panels_q8_0, OM_Q8_0)
OM_DEFINE_GGUF(panels_iq4_nl, OM_IQ4_NL)
OM_DEFINE_GGUF(panels_gguf_mxfp4, OM_GGUF_MXFP4)
OM_DEFINE_GGUF(panels_q2_k, OM_Q2_K)
OM_DEFINE_GGUF(panels_q3_k, OM_Q3_K)
OM_DEFINE_GGUF(panels_q4_k, OM_Q4_K)
OM_DEFINE_GGUF(panels_q5_k, OM_Q5_K)
OM_DEFINE_GGUF(panels_q6_k, OM_Q6_K)
OM_DEFINE_GGUF(panels_iq4_xs, OM_IQ4_XS)

#define OM_GGUF_PANELS \
    [OM_Q4_0] = panels_q4_0, [OM_Q4_1] = panels_q4_1, [OM_Q5_0] = panels_q5_0, [OM_Q5_1] = panels_q5_1, \
    [OM_Q8_0] = panels_q8_0, [OM_IQ4_NL] = panels_iq4_nl, [OM_GGUF_MXFP4] = panels_gguf_mxfp4, [OM_Q2_K] = panels_q2_k, \
    [OM_Q3_K] = panels_q3_k, [OM_Q4_K] = panels_q4_k, [OM_Q5_K] = panels_q5_k, [OM_Q6_K] = panels_q6_k, \
    [OM_IQ4_XS] = panels_iq4_xs
