/* Loops over 64 values that the compiler vectorizes; included once per instruction set. */
#include "om_kernels.h"

#include <math.h>

#define OM_ROUND_MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds to the nearest even integer, for |x| < 2^22 */

OM_INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

OM_INLINE float bits_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

/* As integers, so that a NaN wins and reaches the result. */
OM_INLINE float absmax_of(const float *values, const int count) {
    int32_t largest = 0;
    for (int i = 0; i < count; i++) {
        const int32_t bits = (int32_t)(float_bits(values[i]) & 0x7fffffffu);
        largest = bits > largest ? bits : largest;
    }
    return bits_float((uint32_t)largest);
}

#define OM_ARE_NIBBLES(codec) ((codec) == OM_NF4 || (codec) == OM_MXFP4)

/* A unit has 8 * OM_UNIT_BLOCKS dwords of codes: nibble k of dword j meets element k * dwords + j of the packed values. */
OM_INLINE void pack_nibbles(const int codec, const float *values, float *unit, int block_in_unit) {
    const int dwords = 8 * OM_UNIT_BLOCKS, low_is_odd = codec == OM_NF4;
    for (int k = 0; k < 8; k++)
        for (int j = 0; j < 8; j++)
            unit[k * dwords + block_in_unit * 8 + j] = values[8 * j + k / 2 * 2 + ((k & 1) ^ low_is_odd)];
}

static void pack_blocks(int32_t codec, const float *values, int64_t first_block, int64_t num_blocks, float *packed) {
    if (!OM_ARE_NIBBLES(codec)) {
        __builtin_memcpy(packed + first_block * OM_BLOCK, values, (size_t)num_blocks * OM_BLOCK * sizeof(float));
        return;
    }
    for (int64_t b = first_block; b < first_block + num_blocks; b++, values += OM_BLOCK) {
        float *unit = packed + b / OM_UNIT_BLOCKS * OM_UNIT_BLOCKS * OM_BLOCK;
        if (codec == OM_NF4)
            pack_nibbles(OM_NF4, values, unit, (int)(b % OM_UNIT_BLOCKS));
        else
            pack_nibbles(OM_MXFP4, values, unit, (int)(b % OM_UNIT_BLOCKS));
    }
}

/* exp with a relative error below 2e-7 (Cephes' polynomial); a NaN stays a NaN. */
OM_INLINE float exp_approximate(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504088896341f + OM_ROUND_MAGIC;
    const float exponent = shifted - OM_ROUND_MAGIC;
    const float r = (x - exponent * 0.693359375f) - exponent * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    return p * bits_float((float_bits(shifted) << 23) + 0x3f800000u);
}

OM_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_approximate(-x)); }

OM_INLINE float activation_of(const int activation, float x) {
    switch (activation) {
    case OM_SILU: return x * sigmoid(x);
    case OM_GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    /* tanh(y) = 2 sigmoid(2 y) - 1 */
    case OM_GELU_TANH: return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    case OM_RELU: return x < 0.0f ? 0.0f : x;
    case OM_RELU2: return x < 0.0f ? 0.0f : x * x;
    default: return x;
    }
}

OM_INLINE void activate_as(const int activation, int has_gate, const float *gate, const float *up, float *result, int64_t n) {
    if (has_gate)
        for (int64_t i = 0; i < n; i++) result[i] = activation_of(activation, gate[i]) * up[i];
    else
        for (int64_t i = 0; i < n; i++) result[i] = activation_of(activation, gate[i]);
}

/* Source: GptOssExperts._apply_gate of transformers. */
OM_INLINE void activate_gpt_oss(float alpha, float limit, const float *gate, const float *up, float *result, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float g = gate[i] > limit ? limit : gate[i];
        const float low = up[i] < -limit ? -limit : up[i];
        const float u = low > limit ? limit : low;
        result[i] = (u + 1.0f) * (g * sigmoid(g * alpha));
    }
}

static void activate(int32_t activation, float alpha, float limit, int has_gate, const float *gate, const float *up,
                     float *result, int64_t n) {
    switch (activation) {
    case OM_SILU: activate_as(OM_SILU, has_gate, gate, up, result, n); break;
    case OM_GELU: activate_as(OM_GELU, has_gate, gate, up, result, n); break;
    case OM_GELU_TANH: activate_as(OM_GELU_TANH, has_gate, gate, up, result, n); break;
    case OM_GPT_OSS: activate_gpt_oss(alpha, limit, gate, up, result, n); break;
    case OM_RELU: activate_as(OM_RELU, has_gate, gate, up, result, n); break;
    case OM_RELU2: activate_as(OM_RELU2, has_gate, gate, up, result, n); break;
    default: activate_as(OM_IDENTITY, has_gate, gate, up, result, n); break;
    }
}

/* A code is the number of boundaries below the scaled value, as torch.bucketize counts; a NaN is above all of them.
 * Boundaries are midpoints of neighbouring NF4 values. Source: bitsandbytes, backends/default/ops.py, quantize_4bit. */
static float encode_nf4_block(const float *values, uint8_t *codes) {
    const float absmax = absmax_of(values, OM_BLOCK);
    const float inverse = 1.0f / (absmax < 1e-38f ? 1e-38f : absmax);
    float scaled[OM_BLOCK];
    float boundaries[15];
    int32_t counts[OM_BLOCK];
    for (int i = 0; i < OM_BLOCK; i++) {
        const float value = values[i] * inverse, raised = value < -1.0f ? -1.0f : value;
        scaled[i] = raised > 1.0f ? 1.0f : raised;
    }
    for (int k = 0; k < 15; k++) boundaries[k] = (om_nf4_values[k] + om_nf4_values[k + 1]) / 2.0f;
    for (int i = 0; i < OM_BLOCK; i++) {
        int32_t count = 0;
        for (int k = 0; k < 15; k++) count += !(boundaries[k] >= scaled[i]);
        counts[i] = count;
    }
    for (int i = 0; i < OM_BLOCK / 2; i++) codes[i] = (uint8_t)(counts[2 * i] << 4 | counts[2 * i + 1]);
    return absmax;
}

/* round(value / scale), to even; a block that is not finite gets zeros and a scale that is not finite. */
static float encode_int8_block(const float *values, int8_t *codes) {
    const float scale = absmax_of(values, OM_BLOCK) / 127.0f, divisor = scale == 0.0f ? 1.0f : scale;
    const int is_finite = scale < INFINITY;
    for (int i = 0; i < OM_BLOCK; i++) {
        const float quotient = is_finite ? values[i] / divisor : 0.0f;
        const float raised = quotient < -127.0f ? -127.0f : quotient, clamped = raised > 127.0f ? 127.0f : raised;
        codes[i] = (int8_t)((int32_t)float_bits(clamped + OM_ROUND_MAGIC) - (int32_t)0x4b400000);
    }
    return scale;
}

#include "scale_search.h"

#define OM_ELEMENTWISE_TABLE pack_blocks, activate, encode_nf4_block, encode_int8_block, OM_SEARCH_TABLE
