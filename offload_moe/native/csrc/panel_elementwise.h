/* Quantization and activation of `fast` mode; included once per set, compiled with its flags. */
#include "arithmetic.h"
#include "panel.h"

OM_INLINE void quantize_as(const int codec, const float *values, int64_t first_block, int64_t num_blocks, om_panel_token *token) {
    const int groups = OM_GROUPS(codec), count = OM_BLOCK / groups, half = count / 2, low_is_odd = codec == OM_NF4;
    for (int64_t g = first_block * groups; g < (first_block + num_blocks) * groups; g++, values += count) {
        int8_t natural[OM_BLOCK], *quants = token->quants + g * count;
        token->corrections[g] = -128 * om_quantize_group(values, count, natural, token->scales + g);
        if (codec == OM_INT8) {
            __builtin_memcpy(quants, natural, OM_BLOCK);
            continue;
        }
        for (int i = 0; i < half; i++) {
            quants[i] = natural[2 * i + low_is_odd];
            quants[half + i] = natural[2 * i + 1 - low_is_odd];
        }
    }
}

/* For GGUF's types: in order, with the sums of each 16. */
static void quantize_in_order(const float *values, int64_t first_block, int64_t num_blocks, om_panel_token *token) {
    for (int64_t b = first_block; b < first_block + num_blocks; b++, values += OM_BLOCK) {
        int8_t *quants = token->quants + b * OM_BLOCK;
        om_quantize_group(values, OM_BLOCK, quants, token->scales + b);
        for (int j = 0; j < OM_SUMS; j++) {
            int32_t sum = 0;
            for (int i = 0; i < OM_BLOCK / OM_SUMS; i++) sum += quants[j * (OM_BLOCK / OM_SUMS) + i];
            token->corrections[b * OM_SUMS + j] = sum;
        }
    }
}

static void panel_quantize_blocks(int32_t codec, const float *values, int64_t first_block, int64_t num_blocks,
                                  om_panel_token *token) {
    switch (codec) {
    case OM_NF4: quantize_as(OM_NF4, values, first_block, num_blocks, token); break;
    case OM_INT8: quantize_as(OM_INT8, values, first_block, num_blocks, token); break;
    case OM_MXFP4: quantize_as(OM_MXFP4, values, first_block, num_blocks, token); break;
    default: quantize_in_order(values, first_block, num_blocks, token); break;
    }
}

OM_INLINE void activate_each(const int activation, int has_gate, const float *gate, const float *up, float *result, int64_t count) {
    if (has_gate)
        for (int64_t i = 0; i < count; i++) result[i] = om_activation(activation, gate[i]) * up[i];
    else
        for (int64_t i = 0; i < count; i++) result[i] = om_activation(activation, gate[i]);
}

static void panel_activate(int32_t activation, float alpha, float limit, int has_gate, const float *gate, const float *up,
                           float *result, int64_t count) {
    switch (activation) {
    case OM_SILU: activate_each(OM_SILU, has_gate, gate, up, result, count); break;
    case OM_GELU: activate_each(OM_GELU, has_gate, gate, up, result, count); break;
    case OM_GELU_TANH: activate_each(OM_GELU_TANH, has_gate, gate, up, result, count); break;
    case OM_RELU: activate_each(OM_RELU, has_gate, gate, up, result, count); break;
    case OM_RELU2: activate_each(OM_RELU2, has_gate, gate, up, result, count); break;
    case OM_GPT_OSS:
        for (int64_t i = 0; i < count; i++) result[i] = om_gpt_oss(alpha, limit, gate[i], up[i]);
        break;
    default: activate_each(OM_IDENTITY, has_gate, gate, up, result, count); break;
    }
}
