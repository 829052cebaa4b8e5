/* Rows of a quantized matrix times 1..OM_TILE tokens: the inner loops, written once for every instruction set.
 *
 * The including file defines the vector type and its primitives first:
 *   fvec                        OM_LANES floats; fv_zero, fv_load, fv_broadcast, fv_mul, fv_fma(a, b, c) = a * b + c, fv_sum
 *   fv_halves(p)                the scales p[0] and p[1] on the lanes that `fv_dot` gives a block's two halves of 32
 *   fv_lookup(map, bytes)       map[bytes[i]] for OM_LANES bytes
 *   qblock, q_nf4, q_int8, q_mxfp4(codes)    64 weights as 8-bit integers, the low-nibble ones first
 *   fv_dot(qblock, quants)      their products with 64 int8 activations, summed into the lanes
 *   xblock {fvec v[]}, x_nf4, x_int8, x_mxfp4, x_bf16(codes)    64 weights as floats, per 32: low nibbles, high nibbles
 *   OM_UNSIGNED_WEIGHTS         1 where q_* add 128 (u8 times s8 instructions)
 *   OM_EXACT_TILE               tokens that fit the registers beside an xblock
 *
 * A token's sum is built in the same order whatever the number of tokens beside it, so results do not depend on the batch. */
#include "levels.h"
#include "om_kernels.h"

#define OM_BLOCK_VECTORS (OM_BLOCK / OM_LANES)
#define OM_SCALES_PER_BLOCK(codec) ((codec) == OM_MXFP4 ? 2 : 1)

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
    while (i < count) {
        const int64_t left_in_group = 256 - ((first + i) & 255);
        const int64_t end = i + left_in_group < count ? i + left_in_group : count;
        const float scale = w->nested_scales[(first + i) >> 8];
        for (; i + OM_LANES <= end; i += OM_LANES)
            fv_store(buffer + i, fv_add(fv_mul(fv_lookup(om_dynamic_map, bytes + i), fv_broadcast(scale)), offset));
        for (; i < end; i++) {
            const float product = om_dynamic_map[bytes[i]] * scale; /* two roundings, as bitsandbytes decodes */
            buffer[i] = product + w->nested_offset;
        }
    }
    return buffer;
}

/* products = weight scales times activation scales; returns the sum of weight scales times block sums. */
OM_INLINE float scale_products(const float *scales, const om_token *token, int64_t count, float *products) {
    fvec sums = fv_zero();
    int64_t i = 0;
    for (; i + OM_LANES <= count; i += OM_LANES) {
        const fvec scale = fv_load(scales + i);
        fv_store(products + i, fv_mul(scale, fv_load(token->scales + i)));
        sums = fv_fma(scale, fv_load(token->sums + i), sums);
    }
    float sum = fv_sum(sums);
    for (; i < count; i++) {
        products[i] = scales[i] * token->scales[i];
        sum += scales[i] * token->sums[i];
    }
    return sum;
}

OM_INLINE qblock load_quantized(const int codec, const uint8_t *codes) {
    return codec == OM_NF4 ? q_nf4(codes) : codec == OM_INT8 ? q_int8(codes) : q_mxfp4(codes);
}

OM_INLINE void fast_row(const int codec, const int num_tokens, const om_weights *w, int64_t row, const om_token *tokens,
                        float *results, float *scratch) {
    const int64_t per_block = OM_SCALES_PER_BLOCK(codec), count = w->blocks * per_block;
    const int64_t block_bytes = codec == OM_INT8 ? OM_BLOCK : OM_BLOCK / 2;
    const uint8_t *codes = w->codes + row * w->row_bytes;
    const float *scales = row_scales(codec, w, row, scratch);
    float *products = scratch + count;
    const int8_t *quants[OM_TILE];
    float weighted_sums[OM_TILE];
    fvec sums[OM_TILE];
    for (int t = 0; t < num_tokens; t++) {
        weighted_sums[t] = scale_products(scales, tokens + t, count, products + t * count);
        quants[t] = tokens[t].quants;
        sums[t] = fv_zero();
    }
    for (int64_t b = 0; b < w->blocks; b++) {
        const uint8_t *block = codes + b * block_bytes;
        OM_PREFETCH(block + OM_PREFETCH_BYTES);
        const qblock weights = load_quantized(codec, block);
        for (int t = 0; t < num_tokens; t++) {
            const float *product = products + t * count + b * per_block;
            const fvec scale = per_block == 1 ? fv_broadcast(*product) : fv_halves(product);
            sums[t] = fv_fma(fv_dot(weights, quants[t] + b * OM_BLOCK), scale, sums[t]);
        }
    }
    const float unit = codec == OM_NF4 ? 1.0f / OM_NF4_UNIT : codec == OM_MXFP4 ? 1.0f / OM_MXFP4_UNIT : 1.0f;
    const float zero = (codec == OM_NF4 ? OM_NF4_ZERO : 0.0f) + 128.0f * OM_UNSIGNED_WEIGHTS;
    for (int t = 0; t < num_tokens; t++) results[t] = (fv_sum(sums[t]) - zero * weighted_sums[t]) * unit;
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

OM_INLINE void exact_row(const int codec, const int num_tokens, const om_weights *w, int64_t row, const om_token *tokens,
                         float *results, float *scratch) {
    const int64_t per_block = OM_SCALES_PER_BLOCK(codec);
    const int64_t block_bytes = codec == OM_BF16 ? 2 * OM_BLOCK : codec == OM_INT8 ? OM_BLOCK : OM_BLOCK / 2;
    const uint8_t *codes = w->codes + row * w->row_bytes;
    const float *scales = codec == OM_BF16 ? scratch : row_scales(codec, w, row, scratch);
    const float *values[OM_TILE];
    fvec sums[OM_TILE];
    for (int t = 0; t < num_tokens; t++) {
        values[t] = tokens[t].values;
        sums[t] = fv_zero();
    }
    for (int64_t b = 0; b < w->blocks; b++) {
        const uint8_t *block = codes + b * block_bytes;
        OM_PREFETCH(block + OM_PREFETCH_BYTES);
        if (codec == OM_BF16) OM_PREFETCH(block + OM_PREFETCH_BYTES + OM_BLOCK);
        const xblock weights = load_floats(codec, block);
        for (int t = 0; t < num_tokens; t++)
            sums[t] = exact_block(codec, &weights, values[t] + b * OM_BLOCK, scales + b * per_block, sums[t]);
    }
    for (int t = 0; t < num_tokens; t++)
        results[t] = fv_sum(sums[t]) + (codec == OM_BF16 ? bf16_tail(w, codes, values[t]) : 0.0f);
}

#define OM_ROW_CASE(ROW, CODEC, N) \
    case N: \
        for (int64_t r = 0; r < num_rows; r++) \
            ROW(CODEC, N, weights, first_row + r, tokens, results + r * OM_TILE, scratch); \
        break;

#define OM_ROW_PARAMETERS \
    const om_weights *weights, int64_t first_row, int64_t num_rows, const om_token *tokens, int num_tokens, \
        float *results, float *scratch

#define OM_DEFINE_FAST(NAME, CODEC) \
    static void NAME(OM_ROW_PARAMETERS) { \
        switch (num_tokens) { \
            OM_ROW_CASE(fast_row, CODEC, 1) OM_ROW_CASE(fast_row, CODEC, 2) OM_ROW_CASE(fast_row, CODEC, 3) \
            OM_ROW_CASE(fast_row, CODEC, 4) OM_ROW_CASE(fast_row, CODEC, 5) OM_ROW_CASE(fast_row, CODEC, 6) \
            OM_ROW_CASE(fast_row, CODEC, 7) OM_ROW_CASE(fast_row, CODEC, 8) \
        } \
    }

#define OM_DEFINE_EXACT(NAME, CODEC) \
    static void NAME(OM_ROW_PARAMETERS) { \
        if (num_tokens > OM_EXACT_TILE) { /* the second pass reads the codes from the cache */ \
            NAME(weights, first_row, num_rows, tokens, OM_EXACT_TILE, results, scratch); \
            NAME(weights, first_row, num_rows, tokens + OM_EXACT_TILE, num_tokens - OM_EXACT_TILE, \
                 results + OM_EXACT_TILE, scratch); \
            return; \
        } \
        switch (num_tokens) { \
            OM_ROW_CASE(exact_row, CODEC, 1) OM_ROW_CASE(exact_row, CODEC, 2) OM_ROW_CASE(exact_row, CODEC, 3) \
            OM_ROW_CASE(exact_row, CODEC, 4) OM_ROW_CASE(exact_row, CODEC, 5) OM_ROW_CASE(exact_row, CODEC, 6) \
            OM_ROW_CASE(exact_row, CODEC, 7) OM_ROW_CASE(exact_row, CODEC, 8) \
        } \
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
