/* The phases of an MoE layer over records in panels: docs/decisions/064-one-arithmetic.md, "An expert". */
#include "moe.h"

typedef struct {
    float gate[OM_TILE * OM_CHUNK], up[OM_TILE * OM_CHUNK]; /* [token, row] */
} chunk_results;

void om_lay_out_panels(moe_job *job, uintptr_t *cursor) {
    om_take_inputs_for(&job->panel_inputs, &job->layer->first);
    if (job->layer->up.rows != 0) om_take_inputs_for(&job->panel_inputs, &job->layer->up);
    om_take_inputs_for(&job->panel_hidden, &job->layer->second);
    om_lay_out_panel_inputs(&job->panel_inputs, job->num_tokens, cursor);
    om_lay_out_panel_inputs(&job->panel_hidden, job->group_pairs, cursor);
    const int64_t tile_bytes = om_max(om_panel_tile_bytes(&job->panel_inputs), om_panel_tile_bytes(&job->panel_hidden));
    job->tile_bytes = om_take(cursor, om_pool_threads() * tile_bytes);
}

static uint8_t *scratch_of(const moe_job *job, int thread) {
    return job->tile_bytes + thread * om_max(om_panel_tile_bytes(&job->panel_inputs), om_panel_tile_bytes(&job->panel_hidden));
}

static void add_bias(const om_weights *w, int64_t first_row, int64_t num_rows, float *values) {
    if (w->bias == NULL) return;
    for (int64_t r = 0; r < num_rows; r++) values[r] += om_bias_at(w, first_row + r);
}

/* Bias and activation of one token's chunk, in the form that the second matrix takes. */
static void finish_chunk(const moe_job *job, const om_weights *gate_weights, const om_weights *up_weights, int64_t first_row,
                         int64_t first_up, int64_t num_rows, float *gate, float *up, int64_t pair) {
    const om_moe_layer *layer = job->layer;
    float hidden[OM_CHUNK] = {0};
    add_bias(gate_weights, first_row, num_rows, gate);
    if (layer->has_gate) add_bias(up_weights, first_up, num_rows, up);
    om_active_isa()->panels->activate(layer->activation, layer->alpha, layer->limit, layer->has_gate, gate, up, hidden, num_rows);
    om_quantize_input(&job->panel_hidden, pair - job->group_first_pair, hidden, first_row / OM_CHUNK, 1);
}

void om_first_panels(void *context, int64_t unit, int64_t next_unit, int thread) {
    (void)next_unit;
    const moe_job *job = context;
    const segment *s = &job->segments[unit / job->num_chunks];
    const int64_t first_row = unit % job->num_chunks * OM_CHUNK, num_rows = om_min(OM_CHUNK, job->intermediate - first_row);
    const int has_own_up = job->layer->up.rows != 0;
    const om_weights w = om_resolve(&job->layer->first, job->records[s->expert]);
    const om_weights up = has_own_up ? om_resolve(&job->layer->up, job->records[s->expert]) : w;
    const int64_t first_up = has_own_up ? first_row : job->intermediate + first_row;
    const om_panel_fn rows = om_panels_of(w.codec), up_rows = om_panels_of(up.codec);
    chunk_results results;
    for (int64_t first = s->first_pair, end = first + s->num_pairs; first < end; first += OM_TILE) {
        const int num_tokens = (int)om_min(OM_TILE, end - first);
        const om_panel_tile tile =
            om_gather_panel_tile(&job->panel_inputs, job->token_ids, first, num_tokens, scratch_of(job, thread));
        rows(&w, first_row, num_rows, &tile, results.gate, OM_CHUNK);
        if (job->layer->has_gate) up_rows(&up, first_up, num_rows, &tile, results.up, OM_CHUNK);
        for (int t = 0; t < num_tokens; t++)
            finish_chunk(job, &w, &up, first_row, first_up, num_rows, results.gate + t * OM_CHUNK, results.up + t * OM_CHUNK, first + t);
    }
}

static void second_segment(const moe_job *job, const segment *s, int64_t first_row, int64_t num_rows, int thread) {
    const om_weights w = om_resolve(&job->layer->second, job->records[s->expert]);
    const om_panel_fn rows = om_panels_of(w.codec);
    float results[OM_MAX_OUT_ROWS * OM_TILE];
    for (int64_t first = s->first_pair, end = first + s->num_pairs; first < end; first += OM_TILE) {
        const int num_tokens = (int)om_min(OM_TILE, end - first);
        const om_panel_tile tile =
            om_gather_panel_tile(&job->panel_hidden, NULL, first - job->group_first_pair, num_tokens, scratch_of(job, thread));
        rows(&w, first_row, num_rows, &tile, results, OM_MAX_OUT_ROWS);
        for (int t = 0; t < num_tokens; t++) {
            float *values = results + t * OM_MAX_OUT_ROWS, *out = job->out + job->out_ids[first + t] * w.rows + first_row;
            const float weight = job->pair_weights[first + t];
            add_bias(&w, first_row, num_rows, values);
            for (int64_t r = 0; r < num_rows; r++) out[r] += weight * values[r];
        }
    }
}

void om_second_panels(const moe_job *job, int64_t first_row, int64_t num_rows, int thread) {
    for (int64_t i = 0; i < job->num_segments; i++) second_segment(job, &job->segments[i], first_row, num_rows, thread);
}
