/* Activations of panels: quantized once a token, interleaved by block for a tile; for matrices of plain numbers in fp32. */
#include "job.h"

void om_take_inputs_for(om_panel_inputs *inputs, const om_matrix *m) {
    inputs->cols = m->cols;
    inputs->blocks = om_divide_up(m->cols, OM_BLOCK);
    if (OM_ARE_VALUES(m->codec)) {
        inputs->has_values = 1;
        return;
    }
    inputs->has_quants = 1;
    inputs->codec = m->codec;
    inputs->groups = inputs->blocks * OM_GROUPS(m->codec);
    inputs->num_corrections = inputs->blocks * OM_CORRECTIONS(m->codec);
}

void om_lay_out_panel_inputs(om_panel_inputs *inputs, int64_t num_tokens, uintptr_t *cursor) {
    const int64_t num_values = num_tokens * inputs->blocks * OM_BLOCK;
    inputs->values = om_take(cursor, inputs->has_values ? num_values * (int64_t)sizeof(float) : 0);
    inputs->quants = om_take(cursor, inputs->has_quants ? num_values : 0);
    inputs->scales = om_take(cursor, num_tokens * inputs->groups * (int64_t)sizeof(float));
    inputs->corrections = om_take(cursor, num_tokens * inputs->num_corrections * (int64_t)sizeof(int32_t));
}

static om_panel_token token_of(const om_panel_inputs *inputs, int64_t token) {
    return (om_panel_token){inputs->quants + token * inputs->blocks * OM_BLOCK, inputs->scales + token * inputs->groups,
                            inputs->corrections + token * inputs->num_corrections};
}

static float *values_of(const om_panel_inputs *inputs, int64_t token) { return inputs->values + token * inputs->blocks * OM_BLOCK; }

void om_quantize_input(const om_panel_inputs *inputs, int64_t token, const float *values, int64_t first_block, int64_t num_blocks) {
    om_panel_token target = token_of(inputs, token);
    if (inputs->has_quants) om_active_isa()->panels->quantize_blocks(inputs->codec, values, first_block, num_blocks, &target);
    if (inputs->has_values)
        __builtin_memcpy(values_of(inputs, token) + first_block * OM_BLOCK, values, (size_t)(num_blocks * OM_BLOCK) * sizeof(float));
}

void om_quantize_row(const om_panel_inputs *inputs, int64_t token, const void *x, int32_t dtype, float *buffer) {
    const float *values = om_padded_row(x, dtype, token, inputs->cols, inputs->blocks * OM_BLOCK, buffer);
    om_quantize_input(inputs, token, values, 0, inputs->blocks);
}

int64_t om_panel_tile_bytes(const om_panel_inputs *inputs) {
    if (!inputs->has_quants) return 0;
    const int64_t words = inputs->groups + inputs->num_corrections;
    return om_divide_up(OM_TILE * (inputs->blocks * OM_BLOCK + words * 4), 64) * 64;
}

/* from[count] of 4 bytes each -> to[count, num_tokens], at the token's place */
static void interleave_words(const void *from, int64_t count, int num_tokens, int t, void *to) {
    const uint32_t *source = from;
    uint32_t *target = (uint32_t *)to + t;
    for (int64_t i = 0; i < count; i++) target[i * num_tokens] = source[i];
}

/* The number of tokens that a kernel is there for; those of GGUF's types and of plain numbers take four at a time. */
static int panel_stride(const om_panel_inputs *inputs, int num_tokens) {
    if (OM_IS_GGUF(inputs->codec) || inputs->has_values) return om_tile_stride(num_tokens);
    return num_tokens <= 4 ? num_tokens : num_tokens <= 6 ? 6 : OM_TILE;
}

/* The quants of a tile's tokens, `stride` of them; one is read in place. */
static om_panel_tile gather_quants(const om_panel_inputs *inputs, const int64_t *tokens, int stride, uint8_t *scratch) {
    if (stride == 1) {
        const om_panel_token token = token_of(inputs, tokens[0]);
        return (om_panel_tile){.quants = token.quants, .scales = token.scales, .corrections = token.corrections, .num_tokens = 1};
    }
    int8_t *quants = (int8_t *)scratch;
    float *scales = (float *)(scratch + stride * inputs->blocks * OM_BLOCK);
    int32_t *corrections = (int32_t *)(scales + stride * inputs->groups);
    for (int t = 0; t < stride; t++) {
        const om_panel_token token = token_of(inputs, tokens[t]);
        for (int64_t b = 0; b < inputs->blocks; b++)
            __builtin_memcpy(quants + (b * stride + t) * OM_BLOCK, token.quants + b * OM_BLOCK, OM_BLOCK);
        interleave_words(token.scales, inputs->groups, stride, t, scales);
        interleave_words(token.corrections, inputs->num_corrections, stride, t, corrections);
    }
    return (om_panel_tile){.quants = quants, .scales = scales, .corrections = corrections, .num_tokens = stride};
}

om_panel_tile om_gather_panel_tile(const om_panel_inputs *inputs, const int32_t *token_ids, int64_t first, int num_tokens,
                                   uint8_t *scratch) {
    const int stride = panel_stride(inputs, num_tokens);
    int64_t tokens[OM_TILE];
    for (int t = 0; t < stride; t++) { /* the last one is repeated to fill the tile */
        const int64_t pair = first + om_min(t, num_tokens - 1);
        tokens[t] = token_ids == NULL ? pair : token_ids[pair];
    }
    om_panel_tile tile = {.num_tokens = stride};
    if (inputs->has_quants) tile = gather_quants(inputs, tokens, stride, scratch);
    if (inputs->has_values)
        for (int t = 0; t < stride; t++) tile.values[t] = values_of(inputs, tokens[t]);
    return tile;
}
