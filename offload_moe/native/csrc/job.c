#include "job.h"
#include "gguf_types.h"

static int64_t row_bytes(const om_matrix *m) {
    if (OM_ARE_VALUES(m->codec)) return (m->codec == OM_FP32 ? 4 : 2) * m->cols;
    if (OM_IS_GGUF(m->codec)) return om_num_chunks(m) * om_chunk_dwords(m->codec) * 4;
    return m->codec == OM_INT8 ? m->padded : m->padded / 2;
}

om_weights om_resolve(const om_matrix *m, const uint8_t *record) {
    om_weights w = {
        .codes = record + m->codes,
        .scales = m->scales < 0 ? NULL : record + m->scales,
        .nested_scales = m->nested_scales < 0 ? NULL : (const float *)(record + m->nested_scales),
        .nested_offset = m->nested_offset < 0 ? 0.0f : *(const float *)(record + m->nested_offset),
        .bias = m->bias < 0 ? NULL : record + m->bias,
        .rows = m->rows,
        .cols = m->cols,
        .blocks = (OM_ARE_VALUES(m->codec) ? m->cols : m->padded) / OM_BLOCK,
        .row_bytes = row_bytes(m),
        .codec = m->codec,
        .bias_dtype = m->bias_dtype,
    };
    return w;
}

int64_t om_padded_columns(const om_matrix *m) { return om_divide_up(m->cols, OM_BLOCK) * OM_BLOCK; }

void om_lay_out_activations(om_activations *a, const om_matrix *m, int64_t num_tokens, uintptr_t *cursor) {
    const int64_t unit_blocks = om_active_isa()->unit_blocks;
    a->codec = m->codec;
    a->blocks = om_divide_up(m->cols, OM_BLOCK);
    a->padded_blocks = om_divide_up(a->blocks, unit_blocks) * unit_blocks;
    a->values = om_take(cursor, num_tokens * a->padded_blocks * OM_BLOCK * (int64_t)sizeof(float));
}

static float *values_of(const om_activations *a, int64_t token) { return a->values + token * a->padded_blocks * OM_BLOCK; }

/* What a row reads past a token's last block counts as zero. */
void om_prepare_blocks(const om_activations *a, int64_t token, const float *values, int64_t first_block, int64_t num_blocks) {
    static const float zeros[OM_BLOCK];
    const om_isa *isa = om_active_isa();
    isa->pack_blocks(a->codec, values, first_block, num_blocks, values_of(a, token));
    if (first_block + num_blocks == a->blocks && a->padded_blocks > a->blocks)
        isa->pack_blocks(a->codec, zeros, a->blocks, a->padded_blocks - a->blocks, values_of(a, token));
}

const float *om_padded_row(const void *x, int32_t dtype, int64_t token, int64_t cols, int64_t padded, float *buffer) {
    if (dtype == OM_F32 && cols == padded) return (const float *)x + token * cols;
    for (int64_t i = 0; i < cols; i++)
        buffer[i] = dtype == OM_F32 ? ((const float *)x)[token * cols + i]
                                    : om_bf16_to_float(((const uint16_t *)x)[token * cols + i]);
    for (int64_t i = cols; i < padded; i++) buffer[i] = 0.0f;
    return buffer;
}

void om_prepare_row(const om_activations *a, int64_t token, const void *x, int32_t dtype, int64_t cols, float *buffer) {
    om_prepare_blocks(a, token, om_padded_row(x, dtype, token, cols, a->blocks * OM_BLOCK, buffer), 0, a->blocks);
}

om_tile om_gather_tile(const om_activations *a, const int32_t *token_ids, int64_t first, int num_tokens) {
    om_tile tile = {.num_tokens = om_tile_stride(num_tokens)};
    for (int t = 0; t < tile.num_tokens; t++) {
        const int64_t pair = first + om_min(t, num_tokens - 1);
        tile.values[t] = values_of(a, token_ids == NULL ? pair : token_ids[pair]);
    }
    return tile;
}

float om_bias_at(const om_weights *w, int64_t row) {
    if (w->bias == NULL) return 0.0f;
    return w->bias_dtype == OM_F32 ? ((const float *)w->bias)[row] : om_bf16_to_float(((const uint16_t *)w->bias)[row]);
}

const uint8_t *om_codes_at(const om_matrix *m, const uint8_t *record, int64_t row) {
    return record + m->codes + row * row_bytes(m);
}

int om_call_in_arena(void *job, om_lay_out_fn lay_out, void (*execute)(void *job)) {
    uintptr_t num_bytes = 0;
    om_pool_begin();
    lay_out(job, &num_bytes);
    uintptr_t cursor = (uintptr_t)om_arena_reserve(num_bytes);
    const int has_memory = cursor != 0;
    if (has_memory) {
        lay_out(job, &cursor);
        execute(job);
    }
    om_pool_end();
    return has_memory ? 0 : -1;
}
