/* Activations of panels: quantized once a token, interleaved by block for a tile. */
#include "job.h"

void om_lay_out_panel_inputs(om_panel_inputs *inputs, const om_matrix *m, int64_t num_tokens, uintptr_t *cursor) {
    inputs->codec = m->codec;
    inputs->cols = m->cols;
    inputs->blocks = om_divide_up(m->cols, OM_BLOCK);
    inputs->groups = inputs->blocks * OM_GROUPS(m->codec);
    inputs->num_corrections = inputs->blocks * OM_CORRECTIONS(m->codec);
    inputs->quants = om_take(cursor, num_tokens * inputs->blocks * OM_BLOCK);
    inputs->scales = om_take(cursor, num_tokens * inputs->groups * (int64_t)sizeof(float));
    inputs->corrections = om_take(cursor, num_tokens * inputs->num_corrections * (int64_t)sizeof(int32_t));
}

static om_panel_token token_of(const om_panel_inputs *inputs, int64_t token) {
    return (om_panel_token){inputs->quants + token * inputs->blocks * OM_BLOCK, inputs->scales + token * inputs->groups,
                            inputs->corrections + token * inputs->num_corrections};
}

void om_quantize_input(const om_panel_inputs *inputs, int64_t token, const float *values, int64_t first_block, int64_t num_blocks) {
    om_panel_token target = token_of(inputs, token);
    om_active_isa()->panels->quantize_blocks(inputs->codec, values, first_block, num_blocks, &target);
}

void om_quantize_row(const om_panel_inputs *inputs, int64_t token, const void *x, int32_t dtype, float *buffer) {
    const float *values = om_padded_row(x, dtype, token, inputs->cols, inputs->blocks * OM_BLOCK, buffer);
    om_quantize_input(inputs, token, values, 0, inputs->blocks);
}

int64_t om_panel_tile_bytes(const om_panel_inputs *inputs) {
    const int64_t words = inputs->groups + inputs->num_corrections;
    return om_divide_up(OM_TILE * (inputs->blocks * OM_BLOCK + words * 4), 64) * 64;
}

/* from[count] of 4 bytes each -> to[count, num_tokens], at the token's place */
static void interleave_words(const void *from, int64_t count, int num_tokens, int t, void *to) {
    const uint32_t *source = from;
    uint32_t *target = (uint32_t *)to + t;
    for (int64_t i = 0; i < count; i++) target[i * num_tokens] = source[i];
}

/* The number of tokens that a kernel is there for; those of GGUF types go through four at a time. */
static int panel_stride(int32_t codec, int num_tokens) {
    if (OM_IS_GGUF(codec)) return om_tile_stride(num_tokens);
    return num_tokens <= 4 ? num_tokens : num_tokens <= 6 ? 6 : OM_TILE;
}

om_panel_tile om_gather_panel_tile(const om_panel_inputs *inputs, const int32_t *token_ids, int64_t first, int num_tokens,
                                   uint8_t *scratch) {
    const int stride = panel_stride(inputs->codec, num_tokens);
    if (stride == 1) {
        const om_panel_token token = token_of(inputs, token_ids == NULL ? first : token_ids[first]);
        return (om_panel_tile){token.quants, token.scales, token.corrections, 1};
    }
    int8_t *quants = (int8_t *)scratch;
    float *scales = (float *)(scratch + stride * inputs->blocks * OM_BLOCK);
    int32_t *corrections = (int32_t *)(scales + stride * inputs->groups);
    for (int t = 0; t < stride; t++) { /* the last one is repeated to fill the tile */
        const int64_t pair = first + om_min(t, num_tokens - 1);
        const om_panel_token token = token_of(inputs, token_ids == NULL ? pair : token_ids[pair]);
        for (int64_t b = 0; b < inputs->blocks; b++)
            __builtin_memcpy(quants + (b * stride + t) * OM_BLOCK, token.quants + b * OM_BLOCK, OM_BLOCK);
        interleave_words(token.scales, inputs->groups, stride, t, scales);
        interleave_words(token.corrections, inputs->num_corrections, stride, t, corrections);
    }
    return (om_panel_tile){quants, scales, corrections, stride};
}
