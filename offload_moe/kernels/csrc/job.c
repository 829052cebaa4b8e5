#include "job.h"

static int64_t row_bytes(const om_matrix *m) {
    return m->codec == OM_BF16 ? 2 * m->cols : m->codec == OM_INT8 ? m->padded : m->padded / 2;
}

om_weights om_resolve(const om_matrix *m, const uint8_t *record) {
    const int is_bf16 = m->codec == OM_BF16;
    om_weights w = {
        .codes = record + m->codes,
        .scales = m->scales < 0 ? NULL : record + m->scales,
        .nested_scales = m->nested_scales < 0 ? NULL : (const float *)(record + m->nested_scales),
        .nested_offset = m->nested_offset < 0 ? 0.0f : *(const float *)(record + m->nested_offset),
        .bias = m->bias < 0 ? NULL : record + m->bias,
        .rows = m->rows,
        .cols = m->cols,
        .blocks = is_bf16 ? m->cols / OM_BLOCK : m->padded / OM_BLOCK,
        .row_bytes = row_bytes(m),
        .codec = m->codec,
        .bias_dtype = m->bias_dtype,
    };
    return w;
}

void om_lay_out_activations(om_activations *a, const om_matrix *m, int mode, int64_t num_tokens, uintptr_t *cursor) {
    a->codec = m->codec;
    a->has_values = mode == OM_EXACT || m->codec == OM_BF16;
    a->blocks = om_divide_up(m->cols, OM_BLOCK);
    a->scales = m->codec == OM_MXFP4 ? 2 * a->blocks : a->blocks;
    if (a->has_values) {
        a->values = om_take(cursor, num_tokens * a->blocks * OM_BLOCK * (int64_t)sizeof(float));
        return;
    }
    a->quants = om_take(cursor, num_tokens * a->blocks * OM_QUANT_BYTES);
    a->block_scales = om_take(cursor, num_tokens * a->scales * (int64_t)sizeof(float));
    a->corrections = om_take(cursor, num_tokens * a->scales * (int64_t)sizeof(int32_t));
}

static om_token activation_at(const om_activations *a, int64_t token) {
    om_token result = {0};
    if (a->has_values) {
        result.values = a->values + token * a->blocks * OM_BLOCK;
        return result;
    }
    result.quants = a->quants + token * a->blocks * OM_QUANT_BYTES;
    result.scales = a->block_scales + token * a->scales;
    result.corrections = a->corrections + token * a->scales;
    return result;
}

void om_prepare_blocks(const om_activations *a, int64_t token, const float *values, int64_t first_block, int64_t num_blocks) {
    const om_isa *isa = om_active_isa();
    om_token target = activation_at(a, token);
    (a->has_values ? isa->pack_blocks : isa->quantize_blocks)(a->codec, values, first_block, num_blocks, &target);
}

void om_prepare_row(const om_activations *a, int64_t token, const void *x, int32_t dtype, int64_t cols, float *buffer) {
    const int64_t padded = a->blocks * OM_BLOCK;
    const float *values = buffer;
    if (dtype == OM_F32 && cols == padded) {
        values = (const float *)x + token * cols;
    } else {
        for (int64_t i = 0; i < cols; i++)
            buffer[i] = dtype == OM_F32 ? ((const float *)x)[token * cols + i]
                                        : om_bf16_to_float(((const uint16_t *)x)[token * cols + i]);
        for (int64_t i = cols; i < padded; i++) buffer[i] = 0.0f;
    }
    om_prepare_blocks(a, token, values, 0, a->blocks);
}

static void interleave_scales(const om_activations *a, const om_token *tokens, om_tile *tile, float *buffer) {
    const int stride = tile->num_tokens;
    int32_t *corrections = (int32_t *)(buffer + a->scales * stride);
    for (int64_t i = 0; i < a->scales; i++)
        for (int t = 0; t < stride; t++) {
            buffer[i * stride + t] = tokens[t].scales[i];
            corrections[i * stride + t] = tokens[t].corrections[i];
        }
    tile->scales = buffer;
    tile->corrections = corrections;
}

om_tile om_gather_tile(const om_activations *a, const int32_t *token_ids, int64_t first, int num_tokens, float *buffer) {
    om_token tokens[OM_TILE] = {0};
    om_tile tile = {.num_tokens = om_tile_stride(num_tokens)};
    for (int t = 0; t < tile.num_tokens; t++) {
        const int64_t pair = first + om_min(t, num_tokens - 1);
        tokens[t] = activation_at(a, token_ids == NULL ? pair : token_ids[pair]);
        tile.quants[t] = tokens[t].quants;
        tile.values[t] = tokens[t].values;
    }
    if (a->has_values) return tile;
    tile.scales = tokens[0].scales;
    tile.corrections = tokens[0].corrections;
    if (num_tokens > 1) interleave_scales(a, tokens, &tile, buffer);
    return tile;
}

static int64_t rows_scratch(const om_matrix *m) {
    const int64_t blocks = om_divide_up(m->cols, OM_BLOCK);
    return om_max(OM_SCRATCH_PER_SCALE * 2 * blocks, blocks * OM_BLOCK); /* or a row of fp32 activations */
}

int64_t om_scratch_floats(const om_matrix *m) {
    return rows_scratch(m) + 2 * OM_TILE * 2 * om_divide_up(m->cols, OM_BLOCK);
}

float *om_tile_buffer(const om_matrix *m, float *scratch) { return scratch + rows_scratch(m); }

float om_bias_at(const om_weights *w, int64_t row) {
    if (w->bias == NULL) return 0.0f;
    return w->bias_dtype == OM_F32 ? ((const float *)w->bias)[row] : om_bf16_to_float(((const uint16_t *)w->bias)[row]);
}

const uint8_t *om_codes_at(const om_matrix *m, const uint8_t *record, int64_t row) {
    return record + m->codes + row * row_bytes(m);
}
