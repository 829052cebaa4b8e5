/* Prepared activations and scratch memory, for the calls (`linear.c`, `moe.c`). */
#ifndef OM_JOB_H
#define OM_JOB_H

#include "om_kernels.h"
#include "panel_inputs.h"

/* Activations of several tokens in fp32, ready for the rows of one matrix. */
typedef struct {
    int32_t codec;
    int64_t blocks, padded_blocks; /* per token */
    float *values;
} om_activations;

/* Bytes of scratch are counted and then handed out by the same code: run it at address 0 first. */
OM_INLINE void *om_take(uintptr_t *cursor, int64_t num_bytes) {
    const uintptr_t at = *cursor;
    *cursor = at + (((uintptr_t)num_bytes + 63) & ~(uintptr_t)63);
    return (void *)at;
}

/* A call whose scratch is the arena: with the pool held, counts the bytes, lays the job out and executes it. Returns 0, or -1
 * when memory is short. */
typedef void (*om_lay_out_fn)(void *job, uintptr_t *cursor);
int om_call_in_arena(void *job, om_lay_out_fn lay_out, void (*execute)(void *job));

OM_INLINE void om_add_bias(float *values, const float *bias, int64_t count) {
    if (bias != NULL)
        for (int64_t i = 0; i < count; i++) values[i] += bias[i];
}

OM_INLINE int64_t om_min(int64_t a, int64_t b) { return a < b ? a : b; }
OM_INLINE int64_t om_max(int64_t a, int64_t b) { return a > b ? a : b; }
OM_INLINE int64_t om_divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void om_lay_out_activations(om_activations *a, const om_matrix *matrix, int64_t num_tokens, uintptr_t *cursor);
/* A tile of token_ids[first..first + num_tokens), or of consecutive tokens from `first` where `token_ids` is NULL. */
om_tile om_gather_tile(const om_activations *a, const int32_t *token_ids, int64_t first, int num_tokens);
void om_prepare_blocks(const om_activations *a, int64_t token, const float *values, int64_t first_block, int64_t num_blocks);
/* One row of x, fp32 or bf16, in fp32 and padded with zeros, in place or in `buffer`. */
const float *om_padded_row(const void *x, int32_t dtype, int64_t token, int64_t cols, int64_t padded, float *buffer);
/* One row of x, fp32 or bf16, padded with zeros; `buffer` holds 64 floats per block. */
void om_prepare_row(const om_activations *a, int64_t token, const void *x, int32_t dtype, int64_t cols, float *buffer);
int64_t om_padded_columns(const om_matrix *matrix);
float om_bias_at(const om_weights *weights, int64_t row);
const uint8_t *om_codes_at(const om_matrix *matrix, const uint8_t *record, int64_t row);

/* Several matrices on the same tokens, as a part of a call: with the pool held, and scratch laid out first. */
typedef struct {
    const om_matrix *matrices;
    const uint8_t *const *records;
    void *const *outs;
    const void *x;
    int64_t num_matrices, num_tokens, scratch_floats;
    int32_t x_dtype, out_dtype;
    om_activations activations;
    om_panel_inputs inputs; /* of matrices in panels, in place of `activations` */
    float *scratch; /* per thread */
    om_panel_tile *tiles; /* [num_tokens / OM_TILE, rounded up], of panels */
    uint8_t *tile_memory;
} om_linear_job;

void om_lay_out_linear(om_linear_job *job, uintptr_t *cursor);
void om_run_linear(om_linear_job *job);
/* The job as a call of its own: lays it out and holds the pool. Returns 0, or -1 when memory is short. */
int om_call_linear(om_linear_job *job);

/* Runs `unit` once for each row, on the pool's threads where rows are many: few are less work than a wake-up costs. */
void om_run_rows(om_unit_fn unit, void *context, int64_t num_rows);
/* How many of many rows a call takes at once, so that its vectors, so many bytes for each row, stay few. */
int64_t om_rows_at_once(int64_t row_bytes);

/* RMS norms as a part of a call. */
void om_norm_rows(const float *values, const float *weight, int64_t num_rows, int64_t length, float epsilon, float *result);

void om_rotate(float *head, const float *cos, const float *signed_sin, int64_t dims, int rotation);

/* Unlike the calls of `api.h`, only a part of one: the pool is not held. */
int om_layer_guess(const om_layer *layer, const float *residual, float *normed, float *logits, float *weights, int64_t *ids);

#endif
