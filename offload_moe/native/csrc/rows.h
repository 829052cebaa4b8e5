/* Rows of a matrix in row order times 1..OM_TILE tokens in fp32: the inner loops, written once for every instruction set.
 *
 * A unit is the codes that one vector of OM_LANES dwords holds: OM_UNIT_BLOCKS blocks where codes have 4 bits, one block
 * otherwise. A chunk is OM_LANES scales and the units they belong to. The including file defines before:
 *   fvec                          OM_LANES floats; fv_zero, fv_load, fv_load_some, fv_store, fv_broadcast, fv_add, fv_mul,
 *                                 fv_fma(a, b, c) = a * b + c, fv_pick(a, b, n): the first n lanes of a, the others of b, fv_sum
 *   powers_of_two(bytes, count)   om_e8m0(bytes[i]), without reading past `count`
 *   spread(codec, scales, unit)   the scale of each lane of a unit, from the chunk's
 *   x_raw load_raw(codes, num_blocks), x_vector(codec, raw, codes, k)   vector k of a unit's weights as floats
 *   OM_EXACT_TILE                 tokens whose sums fit the registers
 *
 * A token's sum is built in the same order whatever the number of tokens beside it, so results do not depend on the batch.
 * Rows are read one after another: a single stream comes nearer to the memory's bandwidth than several at once. */
#include "levels.h"
#include "om_kernels.h"

#define OM_UNROLL _Pragma("GCC unroll 16") /* sums stay in registers only where their indices are constants */
#define OM_IS_NIBBLES(codec) ((codec) == OM_NF4 || (codec) == OM_MXFP4)
#define OM_BLOCKS_PER_UNIT(codec) (OM_IS_NIBBLES(codec) ? OM_UNIT_BLOCKS : 1)
#define OM_SCALES_PER_UNIT(codec) ((codec) == OM_MXFP4 ? 2 * OM_UNIT_BLOCKS : OM_BLOCKS_PER_UNIT(codec))
#define OM_WEIGHT_BYTES(codec) ((codec) == OM_INT8 ? 1 : (codec) == OM_BF16 ? 2 : 4) /* where they have more than 4 bits */
#define OM_UNIT_BYTES(codec) (OM_IS_NIBBLES(codec) ? OM_UNIT_BLOCKS * OM_BLOCK / 2 : OM_WEIGHT_BYTES(codec) * OM_BLOCK)
#define OM_UNITS_PER_LINE(codec) (OM_UNIT_BYTES(codec) < 64 ? 64 / OM_UNIT_BYTES(codec) : 1) /* of the cache */
#define OM_UNIT_VECTORS(codec) (OM_BLOCKS_PER_UNIT(codec) * OM_BLOCK / OM_LANES)

/* Where a row is read and what to prefetch meanwhile. */
typedef struct {
    const uint8_t *codes, *ahead;
    int64_t first_scale;
} row_place;

/* Prefetch a fixed distance ahead in these rows, then in the codes that follow them. */
OM_INLINE row_place place_of_row(const om_weights *w, int64_t row, int64_t end_row, int64_t scales) {
    const uint8_t *codes = w->codes + row * w->row_bytes;
    const int64_t beyond = OM_PREFETCH_BYTES - (end_row - row) * w->row_bytes;
    row_place place = {.codes = codes, .ahead = codes, .first_scale = row * scales};
    if (beyond + w->row_bytes <= 0)
        place.ahead = codes + OM_PREFETCH_BYTES;
    else if (w->next_codes != NULL)
        place.ahead = w->next_codes + (beyond > 0 ? beyond : 0);
    return place;
}

/* As integers, which keeps the vector units free. */
OM_INLINE fvec dynamic_map_entries(const uint8_t *bytes, const int count) {
    float entries[OM_LANES] = {0};
    for (int i = 0; i < OM_LANES && i < count; i++) __builtin_memcpy(entries + i, om_dynamic_map + bytes[i], sizeof *entries);
    return fv_load(entries);
}

/* Rounded as bitsandbytes decodes: offset and product may cancel. */
OM_INLINE fvec chunk_scales(const int codec, const om_weights *w, int64_t first, const int count) {
    if (codec == OM_INT8) return fv_load_some((const float *)w->scales + first, count);
    if (codec == OM_MXFP4) return powers_of_two(w->scales + first, count);
    const int left_in_group = 256 - (int)(first & 255);
    const float *group = w->nested_scales + (first >> 8);
    fvec step = fv_broadcast(group[0]);
    if (left_in_group < count) step = fv_pick(step, fv_broadcast(group[1]), left_in_group);
    return fv_add(fv_mul(dynamic_map_entries(w->scales + first, count), step), fv_broadcast(w->nested_offset));
}

OM_INLINE void prefetch_lines(const uint8_t *ahead, const int num_bytes) {
    for (int i = 0; i < num_bytes; i += 64) OM_PREFETCH(ahead + i);
}

/* Two chains of additions a token: in one, each addition would wait for the last. */
OM_INLINE void exact_unit(const int codec, const int num_tokens, const row_place *place, const om_tile *tile, int64_t unit,
                          const int num_blocks, fvec *dots) {
    const uint8_t *codes = place->codes + unit * OM_UNIT_BYTES(codec);
    const int64_t at = unit * OM_UNIT_VECTORS(codec) * OM_LANES;
    if (OM_UNIT_BYTES(codec) >= 64 || unit % 2 == 0) prefetch_lines(place->ahead + unit * OM_UNIT_BYTES(codec), OM_UNIT_BYTES(codec));
    const x_raw raw = load_raw(codec, codes, num_blocks);
    fvec odd_dots[OM_EXACT_TILE];
    OM_UNROLL for (int k = 0; k < OM_UNIT_VECTORS(codec); k++) {
        const fvec weights = x_vector(codec, raw, codes, k);
        OM_UNROLL for (int t = 0; t < num_tokens; t++) {
            fvec *sum = k % 2 ? odd_dots + t : dots + t;
            const fvec values = fv_load(tile->values[t] + at + k * OM_LANES);
            *sum = k < 2 ? fv_mul(weights, values) : fv_fma(weights, values, *sum);
        }
    }
    OM_UNROLL for (int t = 0; t < num_tokens; t++) dots[t] = fv_add(dots[t], odd_dots[t]);
}

OM_INLINE void exact_chunk(const int codec, const int num_tokens, const om_weights *w, const row_place *place,
                           const om_tile *tile, int64_t first, const int count, fvec *sums) {
    const int per_unit = OM_SCALES_PER_UNIT(codec), num_units = (count + per_unit - 1) / per_unit;
    float scales[OM_LANES];
    fv_store(scales, chunk_scales(codec, w, place->first_scale + first, count));
    for (int u = 0; u < num_units; u++) {
        fvec dots[OM_EXACT_TILE];
        const int is_whole = (u + 1) * per_unit <= count || OM_BLOCKS_PER_UNIT(codec) == 1;
        exact_unit(codec, num_tokens, place, tile, first / per_unit + u, is_whole ? OM_BLOCKS_PER_UNIT(codec) : 1, dots);
        const fvec scale = spread(codec, scales, u);
        OM_UNROLL for (int t = 0; t < num_tokens; t++) sums[t] = fv_fma(dots[t], scale, sums[t]);
    }
}

/* Rows of values are not padded: the columns past the last whole block. */
OM_INLINE float values_tail(const int codec, const om_weights *w, const uint8_t *codes, const float *values) {
    float sum = 0.0f;
    for (int64_t i = w->blocks * OM_BLOCK; i < w->cols; i++)
        sum += (codec == OM_FP32 ? ((const float *)codes)[i] : om_bf16_to_float(((const uint16_t *)codes)[i])) * values[i];
    return sum;
}

OM_INLINE void exact_row(const int codec, const int num_tokens, const om_weights *w, int64_t row, int64_t end_row,
                         const om_tile *tile, float *results) {
    const int64_t count = w->blocks * (codec == OM_MXFP4 ? 2 : 1);
    const row_place place = place_of_row(w, row, end_row, count);
    fvec sums[OM_EXACT_TILE];
    int64_t i = 0;
    OM_UNROLL for (int t = 0; t < num_tokens; t++) sums[t] = fv_zero();
    if (OM_ARE_VALUES(codec))
        for (; i < count; i++) {
            fvec dots[OM_EXACT_TILE];
            exact_unit(codec, num_tokens, &place, tile, i, 1, dots);
            OM_UNROLL for (int t = 0; t < num_tokens; t++) sums[t] = fv_add(sums[t], dots[t]);
        }
    for (; i + OM_LANES <= count; i += OM_LANES) exact_chunk(codec, num_tokens, w, &place, tile, i, OM_LANES, sums);
    if (i < count) exact_chunk(codec, num_tokens, w, &place, tile, i, (int)(count - i), sums);
    OM_UNROLL for (int t = 0; t < num_tokens; t++)
        results[t] = fv_sum(sums[t]) + (OM_ARE_VALUES(codec) ? values_tail(codec, w, place.codes, tile->values[t]) : 0.0f);
}

#define OM_ROWS_PARAMETERS const om_weights *w, int64_t first_row, int64_t num_rows, const om_tile *tile, float *results
#define OM_ROWS_CASE(FUNCTION, CODEC, N) \
    case N: \
        for (int64_t i = 0, end = first_row + num_rows; i < num_rows; i++) \
            FUNCTION(CODEC, N, w, first_row + i, end, tile, results + i * OM_TILE); \
        break;

/* The tokens of an exact tile from `first` on. */
OM_INLINE om_tile upper_tile(const om_tile *tile, const int first) {
    om_tile upper = {.num_tokens = tile->num_tokens - first};
    for (int t = 0; t < upper.num_tokens; t++) upper.values[t] = tile->values[first + t];
    return upper;
}

#define OM_DEFINE_EXACT(NAME, CODEC) \
    static void NAME(OM_ROWS_PARAMETERS) { \
        switch (tile->num_tokens) { \
            OM_ROWS_CASE(exact_row, CODEC, 1) OM_ROWS_CASE(exact_row, CODEC, 2) \
            default: OM_ROWS_CASE(exact_row, CODEC, OM_EXACT_TILE) \
        } \
        if (tile->num_tokens <= OM_EXACT_TILE) return; \
        const om_tile upper = upper_tile(tile, OM_EXACT_TILE); /* its pass reads the codes from the cache */ \
        NAME(w, first_row, num_rows, &upper, results + OM_EXACT_TILE); \
    }

OM_DEFINE_EXACT(exact_nf4, OM_NF4)
OM_DEFINE_EXACT(exact_int8, OM_INT8)
OM_DEFINE_EXACT(exact_mxfp4, OM_MXFP4)
OM_DEFINE_EXACT(exact_bf16, OM_BF16)
OM_DEFINE_EXACT(exact_fp32, OM_FP32)

#define OM_ROW_TABLE {exact_nf4, exact_int8, exact_mxfp4, exact_bf16, exact_fp32}, OM_UNIT_BLOCKS
