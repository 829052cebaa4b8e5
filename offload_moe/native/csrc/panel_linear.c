/* Dense linears over panels: several matrices times the same tokens in one call. */
#include "panel_linear.h"

#define UNIT_ROWS 64 /* whole panels */

static void quantize_unit(void *context, int64_t token, int64_t next, int thread) {
    (void)next;
    const om_linear_job *job = context;
    om_quantize_row(&job->inputs, token, job->x, job->x_dtype, job->scratch + thread * job->scratch_floats);
}

static int64_t units_of(const om_matrix *m) {
    const int64_t units = om_divide_up(m->part_rows, UNIT_ROWS);
    return m->rows == m->part_rows ? units : m->rows / m->part_rows * units;
}

/* The matrix of a unit; `unit` becomes the unit within it. */
static int64_t find_matrix(const om_linear_job *job, int64_t *unit) {
    int64_t matrix = 0;
    for (int64_t units; *unit >= (units = units_of(&job->matrices[matrix])); matrix++) *unit -= units;
    return matrix;
}

/* Tokens' rows of a unit, bias added, into the matrix' results. */
static void store_results(const om_linear_job *job, void *out, const om_weights *w, int64_t first_row, int64_t num_rows,
                          int64_t first_token, int num_tokens, float *results) {
    for (int t = 0; t < num_tokens; t++, results += UNIT_ROWS) {
        const int64_t at = (first_token + t) * w->rows + first_row;
        if (w->bias != NULL)
            for (int64_t r = 0; r < num_rows; r++) results[r] += om_bias_at(w, first_row + r);
        if (job->out_dtype == OM_F32)
            __builtin_memcpy((float *)out + at, results, (size_t)num_rows * sizeof(float));
        else
            for (int64_t r = 0; r < num_rows; r++) ((uint16_t *)out)[at + r] = om_float_to_bf16(results[r]);
    }
}

static int tokens_of_tile(const om_linear_job *job, int64_t tile) { return (int)om_min(OM_TILE, job->num_tokens - tile * OM_TILE); }

static void tile_unit(void *context, int64_t tile, int64_t next, int thread) {
    (void)next, (void)thread;
    const om_linear_job *job = context;
    uint8_t *memory = job->tile_memory + tile * om_panel_tile_bytes(&job->inputs);
    job->tiles[tile] = om_gather_panel_tile(&job->inputs, NULL, tile * OM_TILE, tokens_of_tile(job, tile), memory);
}

static void panels_unit(void *context, int64_t unit, int64_t next, int thread) {
    (void)next, (void)thread;
    const om_linear_job *job = context;
    const int64_t matrix = find_matrix(job, &unit), part_rows = job->matrices[matrix].part_rows;
    const int64_t units = om_divide_up(part_rows, UNIT_ROWS), row = unit % units * UNIT_ROWS;
    const int64_t first_row = unit / units * part_rows + row, num_rows = om_min(UNIT_ROWS, part_rows - row);
    const om_weights w = om_resolve(&job->matrices[matrix], job->records[matrix]);
    const om_panel_fn rows = om_panels_of(w.codec);
    float results[UNIT_ROWS * OM_TILE];
    for (int64_t tile = 0; tile * OM_TILE < job->num_tokens; tile++) {
        rows(&w, first_row, num_rows, &job->tiles[tile], results, UNIT_ROWS);
        store_results(job, job->outs[matrix], &w, first_row, num_rows, tile * OM_TILE, tokens_of_tile(job, tile), results);
    }
}

void om_lay_out_panel_linear(om_linear_job *job, uintptr_t *cursor) {
    const int64_t num_tiles = om_divide_up(job->num_tokens, OM_TILE);
    for (int64_t i = 0; i < job->num_matrices; i++) om_take_inputs_for(&job->inputs, &job->matrices[i]);
    om_lay_out_panel_inputs(&job->inputs, job->num_tokens, cursor);
    job->tiles = om_take(cursor, num_tiles * (int64_t)sizeof(om_panel_tile));
    job->tile_memory = om_take(cursor, job->num_tokens == 1 ? 0 : num_tiles * om_panel_tile_bytes(&job->inputs));
}

void om_run_panel_linear(om_linear_job *job) {
    int64_t num_units = 0;
    for (int64_t i = 0; i < job->num_matrices; i++) num_units += units_of(&job->matrices[i]);
    om_pool_run(quantize_unit, job, job->num_tokens);
    om_pool_run(tile_unit, job, om_divide_up(job->num_tokens, OM_TILE));
    om_pool_run(panels_unit, job, num_units);
}
