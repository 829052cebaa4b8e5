/* Scales by least squared error: for a block of 64 weights x the scale and codes of which sum(w (x - scale * level)^2) is least.
 *
 * Loops over 64 values that the compiler vectorizes; included once per instruction set. Sums have 16 lanes in one order, so
 * every set finds the same scales: docs/decisions/122-scales.md. */
#include "om_kernels.h"

#include <math.h>

#define OM_FRACTIONS 5 /* of the greatest magnitude, with both signs: the levels of nf4 are not symmetric */
#define OM_INT8_STEPS 8

typedef struct { float with_values, with_levels; } om_products; /* sum(w x level), sum(w level level) */

/* Of 64 products. */
OM_INLINE float sum_of_block(const float *products) {
    float lanes[16];
    for (int j = 0; j < 16; j++) lanes[j] = (products[j] + products[j + 16]) + (products[j + 32] + products[j + 48]);
    for (int j = 0; j < 8; j++) lanes[j] += lanes[j + 8];
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

OM_INLINE om_products products_of(const float *values, const float *weights, const float *levels) {
    float with_values[OM_BLOCK], with_levels[OM_BLOCK];
    for (int i = 0; i < OM_BLOCK; i++) {
        const float weighed = weights[i] * levels[i];
        with_values[i] = weighed * values[i];
        with_levels[i] = weighed * levels[i];
    }
    return (om_products){sum_of_block(with_values), sum_of_block(with_levels)};
}

OM_INLINE float error_of(const float *values, const float *weights, const float *levels, float scale) {
    float errors[OM_BLOCK];
    for (int i = 0; i < OM_BLOCK; i++) {
        const float error = values[i] - scale * levels[i];
        errors[i] = weights[i] * (error * error);
    }
    return sum_of_block(errors);
}

/* The levels nearest to values * inverse. */
OM_INLINE void nearest_nf4(const float *values, float inverse, float *levels) {
    float boundaries[15];
    for (int k = 0; k < 15; k++) boundaries[k] = (om_nf4_values[k] + om_nf4_values[k + 1]) / 2.0f;
    for (int i = 0; i < OM_BLOCK; i++) {
        const float value = values[i] * inverse;
        float level = om_nf4_values[0];
#pragma GCC unroll 15
        for (int k = 0; k < 15; k++) level = value > boundaries[k] ? om_nf4_values[k + 1] : level;
        levels[i] = level;
    }
}

/* With these levels the error is sum(w x x) minus this, at the scale with_values / with_levels; 0 where that is beyond fp32. */
OM_INLINE float explained(om_products p) {
    const float gain = p.with_values * p.with_values / p.with_levels;
    return gain < INFINITY ? gain : 0.0f;
}

static float search_nf4_scale(const float *values, const float *weights) {
    static const float fractions[OM_FRACTIONS] = {0.7f, 0.7875f, 0.875f, 0.9625f, 1.05f};
    const float absmax = absmax_of(values, OM_BLOCK);
    if (!(absmax < INFINITY)) return NAN;
    if (absmax < 1e-30f) return absmax;
    float levels[OM_BLOCK], best = 0.0f, scale = absmax;
    for (int n = 0; n < 2 * OM_FRACTIONS; n++) {
        const float tried = n % 2 ? -absmax * fractions[n / 2] : absmax * fractions[n / 2];
        nearest_nf4(values, 1.0f / tried, levels);
        const om_products products = products_of(values, weights, levels);
        const float gain = explained(products);
        if (!(gain > best)) continue;
        best = gain;
        scale = products.with_values / products.with_levels;
    }
    nearest_nf4(values, 1.0f / scale, levels);
    const om_products products = products_of(values, weights, levels);
    return explained(products) > 0.0f ? products.with_values / products.with_levels : scale;
}

OM_INLINE float inverse_of(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

/* The first of those `count` scales whose error is least: its number, and its codes, the first of a pair in the high bits. */
static int choose_nf4_scale(const float *values, const float *weights, const float *scales, int count, uint8_t *codes) {
    float levels[OM_BLOCK], least = INFINITY;
    int chosen = 0;
    for (int n = 0; n < count; n++) {
        nearest_nf4(values, inverse_of(scales[n]), levels);
        const float error = error_of(values, weights, levels, scales[n]);
        if (!(error < least)) continue;
        least = error;
        chosen = n;
    }
    const float inverse = inverse_of(scales[chosen]);
    int32_t counts[OM_BLOCK] = {0};
    for (int k = 0; k < 15; k++) {
        const float boundary = (om_nf4_values[k] + om_nf4_values[k + 1]) / 2.0f;
        for (int i = 0; i < OM_BLOCK; i++) counts[i] += values[i] * inverse > boundary;
    }
    for (int i = 0; i < OM_BLOCK / 2; i++) codes[i] = (uint8_t)(counts[2 * i] << 4 | counts[2 * i + 1]);
    return chosen;
}

OM_INLINE void nearest_int8(const float *values, float inverse, float *levels) {
    for (int i = 0; i < OM_BLOCK; i++) {
        const float value = values[i] * inverse, raised = value < -127.0f ? -127.0f : value;
        levels[i] = ((raised > 127.0f ? 127.0f : raised) + OM_ROUND_MAGIC) - OM_ROUND_MAGIC;
    }
}

/* -> codes; returns the scale. */
static float search_int8_block(const float *values, const float *weights, int8_t *codes) {
    const float absmax = absmax_of(values, OM_BLOCK);
    if (!(absmax < INFINITY) || absmax < 1e-30f) return encode_int8_block(values, codes);
    float levels[OM_BLOCK], best = 0.0f, scale = absmax / 127.0f;
    for (int n = 0; n < OM_INT8_STEPS; n++) {
        nearest_int8(values, (127.4f - 0.3f * (float)n) / absmax, levels);
        const om_products products = products_of(values, weights, levels);
        const float gain = explained(products);
        if (!(gain > best)) continue;
        best = gain;
        scale = products.with_values / products.with_levels;
    }
    nearest_int8(values, 1.0f / scale, levels);
    for (int i = 0; i < OM_BLOCK; i++) codes[i] = (int8_t)levels[i];
    return scale;
}

/* Codes of OM_BLOCK columns of OM_BLOCK rows, one column after the other: the error of each is subtracted from later columns,
 * times feedback[64 x 64]'s row of that column, and takes the place of its values. Columns lie `stride` elements apart. */
static void feed_back_nf4_tile(float *values, const float *scales, const float *feedback, int64_t stride, uint8_t *codes) {
    for (int j = 0; j < OM_BLOCK; j++) {
        float *column = values + j * stride, errors[OM_BLOCK];
        const float *column_scales = scales + j * stride;
        float scaled[OM_BLOCK], levels[OM_BLOCK];
        int32_t counts[OM_BLOCK] = {0};
        for (int i = 0; i < OM_BLOCK; i++) {
            scaled[i] = column_scales[i] == 0.0f ? 0.0f : column[i] / column_scales[i];
            levels[i] = om_nf4_values[0];
        }
        for (int k = 0; k < 15; k++) {
            const float boundary = (om_nf4_values[k] + om_nf4_values[k + 1]) / 2.0f, next = om_nf4_values[k + 1];
            for (int i = 0; i < OM_BLOCK; i++) {
                counts[i] += scaled[i] > boundary;
                levels[i] = scaled[i] > boundary ? next : levels[i];
            }
        }
        for (int i = 0; i < OM_BLOCK; i++) {
            codes[j * stride + i] = (uint8_t)counts[i];
            errors[i] = column[i] - column_scales[i] * levels[i];
            column[i] = errors[i];
        }
        for (int k = j + 1; k < OM_BLOCK; k++) {
            const float share = feedback[j * OM_BLOCK + k];
            float *later = values + k * stride;
            for (int i = 0; i < OM_BLOCK; i++) later[i] -= errors[i] * share;
        }
    }
}

#define OM_SEARCH_TABLE search_nf4_scale, choose_nf4_scale, search_int8_block, feed_back_nf4_tile
