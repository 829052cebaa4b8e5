/* One MoE layer's job: what `moe.c` and its part for panels share. */
#ifndef OM_MOE_H
#define OM_MOE_H

#include "job.h"

#define OM_CHUNK OM_BLOCK   /* intermediate features per unit of the first phase: one block of the next activations */
#define OM_MAX_OUT_ROWS 128 /* output features per unit of the second phase; whole panels */

typedef struct {
    int64_t expert, first_pair, num_pairs;
} segment;

typedef struct {
    const om_moe_layer *layer;
    const uint8_t *const *records;
    const int32_t *offsets, *token_ids, *out_ids;
    const float *pair_weights;
    const void *x;
    float *out;
    int64_t num_experts, num_tokens, group_pairs, scratch_floats;
    int32_t x_dtype;
    int is_first_write, has_out_ids, is_in_panels;
    int64_t intermediate, num_chunks, out_rows;
    om_activations inputs, hidden;
    om_panel_inputs panel_inputs, panel_hidden; /* of records in panels, in place of those */
    segment *segments;                          /* of the current group */
    int64_t num_segments, group_first_pair;
    float *scratch;      /* per thread */
    uint8_t *tile_bytes; /* per thread, of panels */
} moe_job;

void om_lay_out_panels(moe_job *job, uintptr_t *cursor);
void om_first_panels(void *job, int64_t unit, int64_t next_unit, int thread); /* an `om_unit_fn` of the first phase */
/* Adds some output features of the group's segments to `out`. */
void om_second_panels(const moe_job *job, int64_t first_row, int64_t num_rows, int thread);

#endif
