/* Dense linears: several matrices times the same tokens in one call. */
#include "panel_linear.h"

#define UNIT_ROWS 64

static void prepare_unit(void *context, int64_t token, int64_t next, int thread) {
    (void)next;
    const om_linear_job *job = context;
    om_prepare_row(&job->activations, token, job->x, job->x_dtype, job->matrices[0].cols,
                   job->scratch + thread * job->scratch_floats);
}

static void store_results(const om_linear_job *job, int64_t matrix, const om_weights *w, int64_t first_row, int64_t num_rows,
                          int64_t first_token, int num_tokens, const float *results) {
    for (int t = 0; t < num_tokens; t++)
        for (int64_t r = 0; r < num_rows; r++) {
            const float value = results[r * OM_TILE + t] + om_bias_at(w, first_row + r);
            const int64_t at = (first_token + t) * w->rows + first_row + r;
            if (job->out_dtype == OM_F32)
                ((float *)job->outs[matrix])[at] = value;
            else
                ((uint16_t *)job->outs[matrix])[at] = om_float_to_bf16(value);
        }
}

/* The matrix of a unit; `unit` becomes the unit within it. */
static int64_t find_matrix(const om_linear_job *job, int64_t *unit) {
    int64_t matrix = 0;
    for (int64_t units; *unit >= (units = om_divide_up(job->matrices[matrix].rows, UNIT_ROWS)); matrix++) *unit -= units;
    return matrix;
}

static const uint8_t *codes_of_unit(const om_linear_job *job, int64_t unit) {
    if (unit < 0) return NULL;
    const int64_t matrix = find_matrix(job, &unit);
    return om_codes_at(&job->matrices[matrix], job->records[matrix], unit * UNIT_ROWS);
}

static void rows_unit(void *context, int64_t unit, int64_t next_unit, int thread) {
    (void)thread;
    const om_linear_job *job = context;
    const uint8_t *next_codes = codes_of_unit(job, next_unit);
    const int64_t matrix = find_matrix(job, &unit);
    om_weights w = om_resolve(&job->matrices[matrix], job->records[matrix]);
    w.next_codes = next_codes;
    const int64_t first_row = unit * UNIT_ROWS, num_rows = om_min(UNIT_ROWS, w.rows - first_row);
    const om_rows_fn rows = om_active_isa()->rows[w.codec];
    float results[UNIT_ROWS * OM_TILE];
    for (int64_t first = 0; first < job->num_tokens; first += OM_TILE) {
        const int num_tokens = (int)om_min(OM_TILE, job->num_tokens - first);
        const om_tile tile = om_gather_tile(&job->activations, NULL, first, num_tokens);
        rows(&w, first_row, num_rows, &tile, results);
        store_results(job, matrix, &w, first_row, num_rows, first, num_tokens, results);
    }
}

void om_lay_out_linear(om_linear_job *job, uintptr_t *cursor) {
    job->scratch_floats = om_padded_columns(&job->matrices[0]);
    if (job->matrices[0].part_rows)
        om_lay_out_panel_linear(job, cursor);
    else
        om_lay_out_activations(&job->activations, &job->matrices[0], job->num_tokens, cursor);
    job->scratch = om_take(cursor, om_pool_threads() * job->scratch_floats * (int64_t)sizeof(float));
}

void om_run_linear(om_linear_job *job) {
    if (job->matrices[0].part_rows) {
        om_run_panel_linear(job);
        return;
    }
    om_pool_run(prepare_unit, job, job->num_tokens);
    int64_t num_units = 0;
    for (int64_t i = 0; i < job->num_matrices; i++) num_units += om_divide_up(job->matrices[i].rows, UNIT_ROWS);
    om_pool_run(rows_unit, job, num_units);
}

static void lay_out(void *job, uintptr_t *cursor) { om_lay_out_linear(job, cursor); }
static void run(void *job) { om_run_linear(job); }

int om_call_linear(om_linear_job *job) { return om_call_in_arena(job, lay_out, run); }

/* outs[i][T, rows of i] = x[T, K] times matrix i, plus its bias. All matrices have the codec, the columns and the order of
 * rows of the first: panels are multiplied with int8 activations, rows with fp32 ones.
 * Returns 0, or -1 when memory is short. */
OM_EXPORT int om_linear_forward(const om_matrix *matrices, const uint8_t *const *records, void *const *outs,
                                int64_t num_matrices, const void *x, int64_t num_tokens, int32_t x_dtype, int32_t out_dtype) {
    om_linear_job job = {.matrices = matrices, .records = records, .outs = outs, .x = x, .num_matrices = num_matrices,
                         .num_tokens = num_tokens, .x_dtype = x_dtype, .out_dtype = out_dtype};
    return om_call_linear(&job);
}
