/* The arithmetic of `fast` mode, one operation after the other: docs/decisions/064-one-arithmetic.md.
 *
 * Every set includes it and its compiler makes vectors of it. No operation may be contracted or reordered, so each gives the
 * same bits. */
#ifndef OM_ARITHMETIC_H
#define OM_ARITHMETIC_H

#include "levels.h"
#include "om_kernels.h"

#include <math.h>

#define OM_MAGIC 12582912.0f           /* 1.5 * 2^23: adding it rounds to the nearest even integer, for |x| < 2^22 */
#define OM_INFINITE_BITS 0x7f800000u   /* infinity; above it are the NaNs */
#define OM_SMALLEST_BITS 0x0d800000u   /* 2^-100: a group of smaller values counts as zero */
#define OM_NAN_BITS 0x7fc00000u

OM_INLINE uint32_t om_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

OM_INLINE float om_from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

/* a * b + c, rounded once. Without the instruction: the product is exact in fp64, the sum is rounded to odd there, and a sum
 * that is odd in 53 bits rounds to 24 as the exact one does. Source: Boldo and Melquiond, "Emulation of FMA" (2008). */
OM_INLINE float om_fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    const double product = (double)a * b, sum = product + c, added = sum - product;
    const double error = (product - (sum - added)) + (c - added);
    int64_t bits;
    __builtin_memcpy(&bits, &sum, sizeof bits);
    const int is_rounded_to_even = ((error < 0.0) | (error > 0.0)) & !(bits & 1); /* a NaN is neither */
    bits += is_rounded_to_even ? ((error > 0.0) == (sum > 0.0) ? 1 : -1) : 0;
    double odd;
    __builtin_memcpy(&odd, &bits, sizeof odd);
    return (float)odd;
#endif
}

/* int8 quants of a group of `count` columns; returns their sum. */
OM_INLINE int32_t om_quantize_group(const float *values, const int count, int8_t *quants, float *scale) {
    uint32_t most = 0;
    for (int i = 0; i < count; i++) {
        const uint32_t bits = om_bits(values[i]) & 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    const int is_usable = most >= OM_SMALLEST_BITS && most < OM_INFINITE_BITS;
    *scale = is_usable ? om_from_bits(most) / 127.0f : most < OM_SMALLEST_BITS ? 0.0f : om_from_bits(OM_NAN_BITS);
    if (!is_usable) {
        for (int i = 0; i < count; i++) quants[i] = 0;
        return 0;
    }
    const float inverse = 127.0f / om_from_bits(most);
    int32_t sum = 0;
    for (int i = 0; i < count; i++) {
        const int32_t quant = (int32_t)om_bits(values[i] * inverse + OM_MAGIC) - (int32_t)om_bits(OM_MAGIC);
        quants[i] = (int8_t)quant;
        sum += quant;
    }
    return sum;
}

/* The dynamic map by its formula: bitsandbytes' entry to 2.8e-7. */
OM_INLINE float om_map_formula(uint8_t code) {
    static const float starts[8] = {OM_MAP_STARTS_UP}, steps[8] = {OM_MAP_STEPS_UP};
    const int centred = code - 127, distance = centred < 0 ? -centred : centred;
    const int piece = distance == 0 ? 0 : 31 - __builtin_clz((unsigned)distance);
    const float size = om_fma(steps[piece], (float)distance, starts[piece]);
    return centred < 0 ? -size : size;
}

/* To 1.4 ulp. */
OM_INLINE float om_exp(float t) {
    t = t < -87.0f ? -87.0f : t;
    t = t > 88.0f ? 88.0f : t;
    const float shifted = t * 0x1.715476p+0f + OM_MAGIC, n = shifted - OM_MAGIC;
    const float r = om_fma(n, 2.12194440e-4f, om_fma(n, -0.693359375f, t));
    float p = om_fma(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = om_fma(p, r, 8.3334519073e-3f);
    p = om_fma(p, r, 4.1665795894e-2f);
    p = om_fma(p, r, 1.6666665459e-1f);
    p = om_fma(p, r, 5.0000001201e-1f);
    p = om_fma(p, r * r, r) + 1.0f;
    return p * om_from_bits((om_bits(shifted) << 23) + 0x3f800000u);
}

/* Cephes' logf, for finite positive numbers. */
OM_INLINE float om_log(float x) {
    int exponent;
    float m = frexpf(x, &exponent);
    if (m < 0.70710678118654752f) {
        exponent -= 1;
        m = m + m - 1.0f;
    } else {
        m = m - 1.0f;
    }
    const float z = m * m;
    float p = 7.0376836292e-2f;
    p = om_fma(p, m, -1.1514610310e-1f);
    p = om_fma(p, m, 1.1676998740e-1f);
    p = om_fma(p, m, -1.2420140846e-1f);
    p = om_fma(p, m, 1.4249322787e-1f);
    p = om_fma(p, m, -1.6668057665e-1f);
    p = om_fma(p, m, 2.0000714765e-1f);
    p = om_fma(p, m, -2.4999993993e-1f);
    p = om_fma(p, m, 3.3333331174e-1f);
    p = p * m * z;
    p = om_fma(-2.12194440e-4f, (float)exponent, p);
    p = om_fma(-0.5f, z, p);
    return om_fma(0.693359375f, (float)exponent, m + p);
}

/* a times the sigmoid of z. */
OM_INLINE float om_over(float a, float z) { return a / (1.0f + om_exp(-z)); }

/* The normal distribution's cumulative function: half of exp(P(t)) = erfc(t) below zero, to 3e-8. */
OM_INLINE float om_phi(float x) {
    const float size = (x < 0.0f ? -x : x) * 0.70710678118654752f, t = size > 5.5f ? 5.5f : size;
    float p = om_fma(0x1.b350acp-20f, t, -0x1.109b1cp-15f);
    p = om_fma(p, t, 0x1.04f330p-12f);
    p = om_fma(p, t, -0x1.93a61ep-11f);
    p = om_fma(p, t, -0x1.077846p-10f);
    p = om_fma(p, t, 0x1.479d96p-6f);
    p = om_fma(p, t, -0x1.a64b9ep-4f);
    p = om_fma(p, t, -0x1.45eb92p-1f);
    p = om_fma(p, t, -0x1.20ddacp+0f);
    const float tail = 0.5f * om_exp(p * t);
    return x < 0.0f ? tail : 1.0f - tail;
}

OM_INLINE float om_activation(const int activation, float g) {
    switch (activation) {
    case OM_SILU: return om_over(g, g);
    case OM_GELU: return g * om_phi(g);
    case OM_GELU_TANH: return om_over(g, 1.5957691216057308f * om_fma(0.044715f * g * g, g, g));
    case OM_RELU: return g < 0.0f ? 0.0f : g;
    case OM_RELU2: return g < 0.0f ? 0.0f : g * g;
    default: return g;
    }
}

/* Source: GptOssExperts._apply_gate of transformers. */
OM_INLINE float om_gpt_oss(float alpha, float limit, float gate, float up) {
    const float g = gate > limit ? limit : gate, low = up < -limit ? -limit : up, u = low > limit ? limit : low;
    return (u + 1.0f) * om_over(g, g * alpha);
}

#endif
