/* Rows of a quantized matrix times 1..OM_TILE tokens: the inner loops, written once for every instruction set.
 *
 * The including file defines the vector type and its primitives first:
 *   fvec                        OM_LANES floats; fv_zero, fv_load, fv_broadcast, fv_mul, fv_fma(a, b, c) = a * b + c, fv_sum
 *   fv_halves(first, second)    on the lanes that `fv_dot` gives a block's two halves of 32
 *   look_up_scales(bytes, count, out)        out[i] = om_dynamic_map[bytes[i]]
 *   qblock, q_nf4, q_int8, q_mxfp4(codes)    64 weights as 8-bit integers, the low-nibble ones first
 *   dot_seed, seed_one, seed_halves          the corrections that fv_dot starts from
 *   fv_dot(qblock, quants, seed)             products with 64 int8 activations, summed into the lanes
 *   xblock {fvec v[]}, x_nf4, x_int8, x_mxfp4, x_bf16(codes)    64 weights as floats, per 32: low nibbles, high nibbles
 *   OM_FAST_ROWS(num_tokens), OM_EXACT_ROWS, OM_EXACT_TILE      rows and tokens whose sums fit the registers
 *
 * A token's sum is built in the same order whatever the number of tokens beside it, so results do not depend on the batch. */
#include "levels.h"
#include "om_kernels.h"

#define OM_UNROLL _Pragma("GCC unroll 16") /* sums stay in registers only where their indices are constants */
#define OM_BLOCK_VECTORS (OM_BLOCK / OM_LANES)
#define OM_SCALES_PER_BLOCK(codec) ((codec) == OM_MXFP4 ? 2 : 1)
#define OM_BLOCK_BYTES(codec) ((codec) == OM_BF16 ? 2 * OM_BLOCK : (codec) == OM_INT8 ? OM_BLOCK : OM_BLOCK / 2)

OM_INLINE const float *row_scales(const int codec, const om_weights *w, int64_t row, float *buffer) {
    const int64_t count = w->blocks * OM_SCALES_PER_BLOCK(codec), first = row * count;
    if (codec == OM_INT8) return (const float *)w->scales + first;
    const uint8_t *bytes = w->scales + first;
    int64_t i = 0;
    if (codec == OM_MXFP4) {
        for (; i < count; i++) buffer[i] = om_e8m0(bytes[i]);
        return buffer;
    }
    const fvec offset = fv_broadcast(w->nested_offset);
    look_up_scales(bytes, count, buffer);
    while (i < count) {
        const int64_t left_in_group = 256 - ((first + i) & 255);
        const int64_t end = i + left_in_group < count ? i + left_in_group : count;
        const float scale = w->nested_scales[(first + i) >> 8];
        for (; i + OM_LANES <= end; i += OM_LANES)
            fv_store(buffer + i, fv_add(fv_mul(fv_load(buffer + i), fv_broadcast(scale)), offset));
        for (; i < end; i++) {
            const float product = buffer[i] * scale; /* two roundings, as bitsandbytes decodes */
            buffer[i] = product + w->nested_offset;
        }
    }
    return buffer;
}

/* products[i * stride + t] = weight scale i times activation scale i of token t. */
OM_INLINE void multiply_scales(const int stride, const float *scales, const float *token_scales, int64_t count, float *products) {
    for (int64_t i = 0; i < count; i++)
        for (int t = 0; t < stride; t++) products[i * stride + t] = scales[i] * token_scales[i * stride + t];
}

/* Where to prefetch from while a row is read: a fixed distance ahead in the rows asked for, then in what follows them. */
OM_INLINE const uint8_t *prefetch_source(const om_weights *w, int64_t row, int64_t end_row) {
    const uint8_t *codes = w->codes + row * w->row_bytes;
    const int64_t beyond = OM_PREFETCH_BYTES - (end_row - row) * w->row_bytes;
    if (beyond + w->row_bytes <= 0) return codes + OM_PREFETCH_BYTES;
    return w->next_codes == NULL ? codes : w->next_codes + (beyond > 0 ? beyond : 0);
}

OM_INLINE qblock load_quantized(const int codec, const uint8_t *codes) {
    return codec == OM_NF4 ? q_nf4(codes) : codec == OM_INT8 ? q_int8(codes) : q_mxfp4(codes);
}

OM_INLINE fvec add_block(const int codec, const int stride, const qblock *weights, const int8_t *quants, const float *product,
                         const int32_t *correction, fvec sum) {
    if (codec == OM_MXFP4) {
        const dot_seed seed = seed_halves(correction, correction + stride);
        return fv_fma(fv_dot(*weights, quants, seed), fv_halves(product[0], product[stride]), sum);
    }
    return fv_fma(fv_dot(*weights, quants, seed_one(correction)), fv_broadcast(*product), sum);
}

OM_INLINE void prefetch_lines(const int num_rows, const uint8_t *const *source, int64_t offset, const int num_bytes) {
    for (int r = 0; r < num_rows; r++)
        for (int i = 0; i < num_bytes; i += 64) OM_PREFETCH(source[r] + offset + i);
}

OM_INLINE void fast_rows(const int codec, const int num_tokens, const int num_rows, const om_weights *w, int64_t row,
                         int64_t end_row, const om_tile *tile, float *results, float *scratch) {
    const int stride = num_tokens, per_block = OM_SCALES_PER_BLOCK(codec);
    const int64_t count = w->blocks * per_block;
    const uint8_t *codes = w->codes + row * w->row_bytes, *source[2];
    float *products = scratch + count;
    const int8_t *quants[OM_TILE];
    fvec sums[2][OM_TILE];
    OM_UNROLL for (int r = 0; r < num_rows; r++) {
        multiply_scales(stride, row_scales(codec, w, row + r, scratch), tile->scales, count, products + r * count * stride);
        source[r] = prefetch_source(w, row + r, end_row);
        OM_UNROLL for (int t = 0; t < num_tokens; t++) sums[r][t] = fv_zero();
    }
    OM_UNROLL for (int t = 0; t < num_tokens; t++) quants[t] = tile->quants[t];
    for (int64_t b = 0; b < w->blocks; b++) {
        const int64_t at = b * per_block * stride, offset = b * OM_BLOCK_BYTES(codec);
        qblock weights[2];
        if (offset % 64 == 0) prefetch_lines(num_rows, source, offset, 64);
        OM_UNROLL for (int r = 0; r < num_rows; r++) weights[r] = load_quantized(codec, codes + r * w->row_bytes + offset);
        OM_UNROLL for (int t = 0; t < num_tokens; t++)
            OM_UNROLL for (int r = 0; r < num_rows; r++)
                sums[r][t] = add_block(codec, stride, &weights[r], quants[t] + b * OM_QUANT_BYTES,
                                       products + r * count * stride + at + t, tile->corrections + at + t, sums[r][t]);
    }
    const float unit = codec == OM_NF4 ? 1.0f / OM_NF4_UNIT : codec == OM_MXFP4 ? 1.0f / OM_MXFP4_UNIT : 1.0f;
    OM_UNROLL for (int r = 0; r < num_rows; r++)
        OM_UNROLL for (int t = 0; t < num_tokens; t++) results[r * OM_TILE + t] = fv_sum(sums[r][t]) * unit;
}

OM_INLINE xblock load_floats(const int codec, const uint8_t *codes) {
    return codec == OM_NF4 ? x_nf4(codes) : codec == OM_INT8 ? x_int8(codes) : codec == OM_MXFP4 ? x_mxfp4(codes) : x_bf16(codes);
}

OM_INLINE fvec float_dot(const xblock *weights, const float *values, const int first, const int end) {
    fvec sum = fv_mul(weights->v[first], fv_load(values + first * OM_LANES));
    for (int i = first + 1; i < end; i++) sum = fv_fma(weights->v[i], fv_load(values + i * OM_LANES), sum);
    return sum;
}

OM_INLINE fvec exact_block(const int codec, const xblock *weights, const float *values, const float *scale, fvec sum) {
    if (codec == OM_MXFP4) {
        const int half = OM_BLOCK_VECTORS / 2;
        sum = fv_fma(float_dot(weights, values, 0, half), fv_broadcast(scale[0]), sum);
        return fv_fma(float_dot(weights, values, half, OM_BLOCK_VECTORS), fv_broadcast(scale[1]), sum);
    }
    const fvec dot = float_dot(weights, values, 0, OM_BLOCK_VECTORS);
    return codec == OM_BF16 ? fv_add(dot, sum) : fv_fma(dot, fv_broadcast(*scale), sum);
}

/* bf16 rows are not padded: the columns past the last whole block. */
OM_INLINE float bf16_tail(const om_weights *w, const uint8_t *codes, const float *values) {
    float sum = 0.0f;
    for (int64_t i = w->blocks * OM_BLOCK; i < w->cols; i++) {
        uint16_t bits;
        __builtin_memcpy(&bits, codes + 2 * i, 2);
        sum += om_bf16_to_float(bits) * values[i];
    }
    return sum;
}

OM_INLINE void exact_rows(const int codec, const int num_tokens, const int num_rows, const om_weights *w, int64_t row,
                          int64_t end_row, const om_tile *tile, float *results, float *scratch) {
    const int64_t per_block = OM_SCALES_PER_BLOCK(codec);
    const uint8_t *codes = w->codes + row * w->row_bytes, *source[2];
    const float *scales[2], *values[OM_EXACT_TILE];
    fvec sums[2][OM_EXACT_TILE];
    OM_UNROLL for (int r = 0; r < num_rows; r++) {
        scales[r] = codec == OM_BF16 ? scratch : row_scales(codec, w, row + r, scratch + r * w->blocks * per_block);
        source[r] = prefetch_source(w, row + r, end_row);
        OM_UNROLL for (int t = 0; t < num_tokens; t++) sums[r][t] = fv_zero();
    }
    OM_UNROLL for (int t = 0; t < num_tokens; t++) values[t] = tile->values[t];
    for (int64_t b = 0; b < w->blocks; b++) {
        if (OM_BLOCK_BYTES(codec) >= 64 || b % 2 == 0)
            prefetch_lines(num_rows, source, b * OM_BLOCK_BYTES(codec), OM_BLOCK_BYTES(codec));
        OM_UNROLL for (int r = 0; r < num_rows; r++) {
            const xblock weights = load_floats(codec, codes + r * w->row_bytes + b * OM_BLOCK_BYTES(codec));
            OM_UNROLL for (int t = 0; t < num_tokens; t++)
                sums[r][t] = exact_block(codec, &weights, values[t] + b * OM_BLOCK, scales[r] + b * per_block, sums[r][t]);
        }
    }
    OM_UNROLL for (int r = 0; r < num_rows; r++)
        OM_UNROLL for (int t = 0; t < num_tokens; t++)
            results[r * OM_TILE + t] =
                fv_sum(sums[r][t]) + (codec == OM_BF16 ? bf16_tail(w, codes + r * w->row_bytes, values[t]) : 0.0f);
}

/* Rows in groups, then the one that is left; N is a constant, so that the loops over tokens unroll. */
#define OM_ROWS_CASE(ROWS, CODEC, N, GROUP) \
    case N: { \
        const int64_t end = first_row + num_rows; \
        int64_t row = first_row; \
        for (; row + (GROUP) <= end; row += (GROUP)) \
            ROWS(CODEC, N, GROUP, weights, row, end, tile, results + (row - first_row) * OM_TILE, scratch); \
        for (; row < end; row++) \
            ROWS(CODEC, N, 1, weights, row, end, tile, results + (row - first_row) * OM_TILE, scratch); \
        break; \
    }

#define OM_ROWS_PARAMETERS \
    const om_weights *weights, int64_t first_row, int64_t num_rows, const om_tile *tile, float *results, float *scratch

/* The tokens of an exact tile from `first` on. */
OM_INLINE om_tile upper_tile(const om_tile *tile, const int first) {
    om_tile upper = {.num_tokens = tile->num_tokens - first};
    for (int t = 0; t < upper.num_tokens; t++) upper.values[t] = tile->values[first + t];
    return upper;
}

#define OM_FAST_CASE(CODEC, N) OM_ROWS_CASE(fast_rows, CODEC, N, OM_FAST_ROWS(N))
#define OM_DEFINE_FAST(NAME, CODEC) \
    static void NAME(OM_ROWS_PARAMETERS) { \
        switch (tile->num_tokens) { \
            OM_FAST_CASE(CODEC, 1) OM_FAST_CASE(CODEC, 2) OM_FAST_CASE(CODEC, 4) OM_FAST_CASE(CODEC, 8) \
        } \
    }

#define OM_EXACT_CASE(CODEC, N) OM_ROWS_CASE(exact_rows, CODEC, N, OM_EXACT_ROWS)
#define OM_DEFINE_EXACT(NAME, CODEC) \
    static void NAME(OM_ROWS_PARAMETERS) { \
        switch (tile->num_tokens) { \
            OM_EXACT_CASE(CODEC, 1) OM_EXACT_CASE(CODEC, 2) \
            default: OM_EXACT_CASE(CODEC, OM_EXACT_TILE) \
        } \
        if (tile->num_tokens <= OM_EXACT_TILE) return; \
        const om_tile upper = upper_tile(tile, OM_EXACT_TILE); /* its pass reads the codes from the cache */ \
        NAME(weights, first_row, num_rows, &upper, results + OM_EXACT_TILE, scratch); \
    }

OM_DEFINE_FAST(fast_nf4, OM_NF4)
OM_DEFINE_FAST(fast_int8, OM_INT8)
OM_DEFINE_FAST(fast_mxfp4, OM_MXFP4)
OM_DEFINE_EXACT(exact_nf4, OM_NF4)
OM_DEFINE_EXACT(exact_int8, OM_INT8)
OM_DEFINE_EXACT(exact_mxfp4, OM_MXFP4)
OM_DEFINE_EXACT(exact_bf16, OM_BF16)

#define OM_ROW_TABLE \
    {{exact_nf4, exact_int8, exact_mxfp4, exact_bf16}, {fast_nf4, fast_int8, fast_mxfp4, exact_bf16}}
