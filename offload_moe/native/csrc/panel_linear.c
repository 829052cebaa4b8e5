/* Dense linears over panels: several matrices times the same tokens in one call. */
#include "panel_linear.h"

#define UNIT_ROWS 64 /* whole panels */

static void quantize_unit(void *context, int64_t token, int64_t next, int thread) {
    (void)next;
    const om_linear_job *job = context;
    om_quantize_row(&job->inputs, token, job->x, job->x_dtype, job->scratch + thread * job->scratch_floats);
}

static int64_t units_of(const om_matrix *m) { return m->rows / m->part_rows * om_divide_up(m->part_rows, UNIT_ROWS); }

/* The matrix of a unit; `unit` becomes the unit within it. */
static int64_t find_matrix(const om_linear_job *job, int64_t *unit) {
    int64_t matrix = 0;
    for (int64_t units; *unit >= (units = units_of(&job->matrices[matrix])); matrix++) *unit -= units;
    return matrix;
}

/* [tokens, rows] of a unit, bias added, into the matrix' results. */
static void store_results(const om_linear_job *job, int64_t matrix, const om_weights *w, int64_t first_row, int64_t num_rows,
                          int64_t first_token, int num_tokens, const float *results) {
    for (int t = 0; t < num_tokens; t++)
        for (int64_t r = 0; r < num_rows; r++) {
            const float sum = results[t * UNIT_ROWS + r];
            const float value = w->bias == NULL ? sum : sum + om_bias_at(w, first_row + r);
            const int64_t at = (first_token + t) * w->rows + first_row + r;
            if (job->out_dtype == OM_F32)
                ((float *)job->outs[matrix])[at] = value;
            else
                ((uint16_t *)job->outs[matrix])[at] = om_float_to_bf16(value);
        }
}

static void panels_unit(void *context, int64_t unit, int64_t next_unit, int thread) {
    (void)next_unit;
    const om_linear_job *job = context;
    const int64_t matrix = find_matrix(job, &unit), part_rows = job->matrices[matrix].part_rows;
    const int64_t units = om_divide_up(part_rows, UNIT_ROWS), row = unit % units * UNIT_ROWS;
    const int64_t first_row = unit / units * part_rows + row, num_rows = om_min(UNIT_ROWS, part_rows - row);
    const om_weights w = om_resolve(&job->matrices[matrix], job->records[matrix]);
    float results[UNIT_ROWS * OM_TILE];
    for (int64_t first = 0; first < job->num_tokens; first += OM_TILE) {
        const int num_tokens = (int)om_min(OM_TILE, job->num_tokens - first);
        const om_panel_tile tile =
            om_gather_panel_tile(&job->inputs, NULL, first, num_tokens, job->tiles + thread * om_panel_tile_bytes(&job->inputs));
        om_active_isa()->panels->rows[w.codec](&w, first_row, num_rows, &tile, results, UNIT_ROWS);
        store_results(job, matrix, &w, first_row, num_rows, first, num_tokens, results);
    }
}

void om_lay_out_panel_linear(om_linear_job *job, uintptr_t *cursor) {
    om_lay_out_panel_inputs(&job->inputs, &job->matrices[0], job->num_tokens, cursor);
    job->tiles = om_take(cursor, om_pool_threads() * om_panel_tile_bytes(&job->inputs));
}

void om_run_panel_linear(om_linear_job *job) {
    int64_t num_units = 0;
    for (int64_t i = 0; i < job->num_matrices; i++) num_units += units_of(&job->matrices[i]);
    om_pool_run(quantize_unit, job, job->num_tokens);
    om_pool_run(panels_unit, job, num_units);
}
