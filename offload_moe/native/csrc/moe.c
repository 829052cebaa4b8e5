/* One MoE layer: first matrix, activation, second matrix and the weighted sum, for every active expert in one call.
 *
 * A pair is a token routed to an expert. Each output element is the sum of its pairs in the order of the experts given,
 * made by one thread, so the result depends neither on the number of threads nor on how the pairs are split into groups. */
#include "float_mode.h"
#include "moe.h"

#include <string.h>

#define MIN_OUT_ROWS 32
#define GROUP_BYTES (48ll << 20)  /* intermediate activations kept at once */

static void prepare_unit(void *context, int64_t token, int64_t next, int thread) {
    (void)next;
    const moe_job *job = context;
    float *scratch = job->scratch + thread * job->scratch_floats;
    if (job->is_in_panels)
        om_quantize_row(&job->panel_inputs, token, job->x, job->x_dtype, scratch);
    else
        om_prepare_row(&job->inputs, token, job->x, job->x_dtype, job->layer->first.cols, scratch);
}

typedef struct {
    float gate[2 * OM_CHUNK * OM_TILE], up[OM_CHUNK * OM_TILE];
} chunk_results;

static int is_interleaved(const om_moe_layer *layer) { return layer->has_gate && layer->is_interleaved; }

static void first_rows(const moe_job *job, const om_weights *w, int64_t first_row, int64_t num_rows, const om_tile *tile,
                       chunk_results *results) {
    const om_rows_fn rows = om_rows_of(w->codec);
    if (is_interleaved(job->layer)) {
        rows(w, 2 * first_row, 2 * num_rows, tile, results->gate);
    } else if (job->layer->has_gate) {
        om_weights gate = *w;
        gate.next_codes = w->codes + (job->intermediate + first_row) * w->row_bytes;
        rows(&gate, first_row, num_rows, tile, results->gate);
        rows(w, job->intermediate + first_row, num_rows, tile, results->up);
    } else {
        rows(w, first_row, num_rows, tile, results->gate);
    }
}

static const uint8_t *first_codes_of_unit(const moe_job *job, int64_t unit) {
    if (unit < 0) return NULL;
    const int64_t row = unit % job->num_chunks * OM_CHUNK * (is_interleaved(job->layer) ? 2 : 1);
    return om_codes_at(&job->layer->first, job->records[job->segments[unit / job->num_chunks].expert], row);
}

/* Bias and activation of one token's chunk, then into the form of the second matrix's input. */
static void finish_chunk(const moe_job *job, const om_weights *w, int64_t chunk, int64_t num_rows, const chunk_results *results,
                         int tile_token, int64_t pair) {
    const om_moe_layer *layer = job->layer;
    const int64_t first_row = chunk * OM_CHUNK;
    float gate[OM_CHUNK], up[OM_CHUNK], hidden[OM_CHUNK] = {0};
    for (int64_t r = 0; r < num_rows; r++) {
        if (is_interleaved(layer)) {
            gate[r] = results->gate[2 * r * OM_TILE + tile_token] + om_bias_at(w, 2 * (first_row + r));
            up[r] = results->gate[(2 * r + 1) * OM_TILE + tile_token] + om_bias_at(w, 2 * (first_row + r) + 1);
            continue;
        }
        gate[r] = results->gate[r * OM_TILE + tile_token] + om_bias_at(w, first_row + r);
        if (layer->has_gate)
            up[r] = results->up[r * OM_TILE + tile_token] + om_bias_at(w, job->intermediate + first_row + r);
    }
    om_active_isa()->activate(layer->activation, layer->alpha, layer->limit, layer->has_gate, gate, up, hidden, num_rows);
    om_prepare_blocks(&job->hidden, pair - job->group_first_pair, hidden, chunk, 1);
}

static void first_unit(void *context, int64_t unit, int64_t next_unit, int thread) {
    (void)thread;
    const moe_job *job = context;
    const segment *s = &job->segments[unit / job->num_chunks];
    const int64_t chunk = unit % job->num_chunks, first_row = chunk * OM_CHUNK;
    const int64_t num_rows = om_min(OM_CHUNK, job->intermediate - first_row);
    om_weights w = om_resolve(&job->layer->first, job->records[s->expert]);
    w.next_codes = first_codes_of_unit(job, next_unit);
    chunk_results results;
    for (int64_t first = s->first_pair, end = first + s->num_pairs; first < end; first += OM_TILE) {
        const int num_tokens = (int)om_min(OM_TILE, end - first);
        const om_tile tile = om_gather_tile(&job->inputs, job->token_ids, first, num_tokens);
        first_rows(job, &w, first_row, num_rows, &tile, &results);
        for (int t = 0; t < num_tokens; t++) finish_chunk(job, &w, chunk, num_rows, &results, t, first + t);
    }
}

static void add_results(const moe_job *job, const om_weights *w, int64_t first_row, int64_t num_rows, int64_t pair,
                        const float *results, int tile_token) {
    const float weight = job->pair_weights[pair];
    float *out = job->out + job->out_ids[pair] * w->rows + first_row;
    for (int64_t r = 0; r < num_rows; r++)
        out[r] += weight * (results[r * OM_TILE + tile_token] + om_bias_at(w, first_row + r));
}

static void second_segment(const moe_job *job, const segment *s, const uint8_t *next_codes, int64_t first_row,
                           int64_t num_rows) {
    om_weights w = om_resolve(&job->layer->second, job->records[s->expert]);
    w.next_codes = next_codes;
    const om_rows_fn rows = om_rows_of(w.codec);
    float results[OM_MAX_OUT_ROWS * OM_TILE];
    for (int64_t first = s->first_pair, end = first + s->num_pairs; first < end; first += OM_TILE) {
        const int num_tokens = (int)om_min(OM_TILE, end - first);
        const om_tile tile = om_gather_tile(&job->hidden, NULL, first - job->group_first_pair, num_tokens);
        rows(&w, first_row, num_rows, &tile, results);
        for (int t = 0; t < num_tokens; t++) add_results(job, &w, first_row, num_rows, first + t, results, t);
    }
}

static const uint8_t *second_codes(const moe_job *job, int64_t segment_index, int64_t row) {
    return om_codes_at(&job->layer->second, job->records[job->segments[segment_index].expert], row);
}

/* Some columns of every row that is about to be written. */
static void clear_rows(const moe_job *job, int64_t first_column, int64_t num_columns) {
    const int64_t num_rows = job->has_out_ids ? job->offsets[job->num_experts] : job->num_tokens;
    for (int64_t i = 0; i < num_rows; i++) {
        float *out = job->out + (job->has_out_ids ? job->out_ids[i] : i) * job->layer->second.rows + first_column;
        for (int64_t c = 0; c < num_columns; c++) out[c] = 0.0f;
    }
}

static void second_unit(void *context, int64_t unit, int64_t next_unit, int thread) {
    const moe_job *job = context;
    const int64_t hidden = job->layer->second.rows, first_row = unit * job->out_rows;
    const int64_t num_rows = om_min(job->out_rows, hidden - first_row);
    if (job->is_first_write) clear_rows(job, first_row, num_rows);
    if (job->is_in_panels) {
        om_second_panels(job, first_row, num_rows, thread);
        return;
    }
    for (int64_t i = 0; i < job->num_segments; i++) {
        const uint8_t *next_codes = i + 1 < job->num_segments ? second_codes(job, i + 1, first_row)
                                    : next_unit >= 0          ? second_codes(job, 0, next_unit * job->out_rows)
                                                              : NULL;
        second_segment(job, &job->segments[i], next_codes, first_row, num_rows);
    }
}

/* Take pairs from `pair` on, whole experts as far as the group has room. Returns the first pair left out. */
static int64_t fill_group(moe_job *job, int64_t pair, int64_t *expert) {
    const int64_t end = pair + job->group_pairs;
    job->group_first_pair = pair;
    job->num_segments = 0;
    for (; *expert < job->num_experts && pair < end; ++*expert) {
        const int64_t expert_end = job->offsets[*expert + 1], stop = om_min(expert_end, end);
        if (stop > pair) job->segments[job->num_segments++] = (segment){*expert, pair, stop - pair};
        pair = stop;
        if (stop < expert_end) break;
    }
    return pair;
}

static void run_groups(moe_job *job) {
    const int64_t num_pairs = job->offsets[job->num_experts];
    int64_t pair = 0, expert = 0;
    om_pool_run(prepare_unit, job, job->num_tokens);
    do {
        pair = fill_group(job, pair, &expert);
        om_pool_run(job->is_in_panels ? om_first_panels : first_unit, job, job->num_segments * job->num_chunks);
        om_pool_run(second_unit, job, om_divide_up(job->layer->second.rows, job->out_rows));
        job->is_first_write = 0;
    } while (pair < num_pairs);
}

static void convert_out(const float *values, uint16_t *out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = om_float_to_bf16(values[i]);
}

static uintptr_t lay_out(moe_job *job, void **bf16_sums, uintptr_t start) {
    const om_moe_layer *layer = job->layer;
    uintptr_t cursor = start;
    if (job->is_in_panels) {
        om_lay_out_panels(job, &cursor);
    } else {
        om_lay_out_activations(&job->inputs, &layer->first, job->num_tokens, &cursor);
        om_lay_out_activations(&job->hidden, &layer->second, job->group_pairs, &cursor);
    }
    job->segments = om_take(&cursor, job->num_experts * (int64_t)sizeof(segment));
    job->scratch = om_take(&cursor, om_pool_threads() * job->scratch_floats * (int64_t)sizeof(float));
    if (*bf16_sums != NULL) *bf16_sums = om_take(&cursor, job->num_tokens * layer->second.rows * (int64_t)sizeof(float));
    return cursor - start;
}

static void plan(moe_job *job) {
    const om_moe_layer *layer = job->layer;
    job->is_in_panels = layer->first.part_rows != 0;
    const int64_t bytes_per_pair = layer->second.cols * (job->is_in_panels ? 1 : 4);
    const int64_t room = GROUP_BYTES / bytes_per_pair / OM_TILE * OM_TILE;
    job->group_pairs = om_max(1, om_min(job->offsets[job->num_experts], om_max(OM_TILE, room)));
    job->intermediate = layer->has_gate && layer->up.rows == 0 ? layer->first.rows / 2 : layer->first.rows;
    job->num_chunks = om_divide_up(job->intermediate, OM_CHUNK);
    /* long streams where threads are few, enough units to share where they are many */
    const int64_t share = layer->second.rows / (8 * om_pool_threads()) / OM_PANEL * OM_PANEL;
    job->out_rows = om_max(MIN_OUT_ROWS, om_min(OM_MAX_OUT_ROWS, share));
    job->scratch_floats = om_max(om_padded_columns(&layer->first), om_padded_columns(&layer->second));
}

static int is_in_range(const int32_t *offsets, const int32_t *token_ids, int64_t num_experts, int64_t num_tokens) {
    if (offsets[0] != 0) return 0;
    for (int64_t e = 0; e < num_experts; e++)
        if (offsets[e + 1] < offsets[e]) return 0;
    for (int64_t i = 0; i < offsets[num_experts]; i++)
        if (token_ids[i] < 0 || token_ids[i] >= num_tokens) return 0;
    return 1;
}

void om_scale_inputs(const float *x, int64_t hidden, const int32_t *row_ids, int64_t num_pairs, float *weights, int32_t *own_rows,
                     float *scaled) {
    for (int64_t pair = 0; pair < num_pairs; pair++) {
        const float *row = x + row_ids[pair] * hidden, weight = weights[pair];
        for (int64_t i = 0; i < hidden; i++) scaled[pair * hidden + i] = weight * row[i];
        own_rows[pair] = (int32_t)pair;
        weights[pair] = 1.0f;
    }
}

/* out[T, H] = (accumulate: +=) the experts' weighted sum for x[T, H]. Pairs of expert e: offsets[e] .. offsets[e + 1] of
 * token_ids and pair_weights. An `out` of bf16 is rounded once, at the end, and cannot be accumulated into.
 * Records in panels (both matrices) are multiplied with int8 activations, rows with fp32 ones. out_ids: the row of `out`, then
 * of fp32, that each pair goes to; NULL: its token's.
 * Returns 0, -1 when memory is short, -2 when a pair or a token id is out of range. */
OM_EXPORT int om_moe_forward(const om_moe_layer *layer, const void *x, int64_t num_tokens, int32_t x_dtype,
                             const uint8_t *const *records, const int32_t *offsets, const int32_t *token_ids,
                             const int32_t *out_ids, const float *pair_weights, int64_t num_experts, void *out,
                             int32_t out_dtype, int32_t accumulate) {
    moe_job job = {.layer = layer, .records = records, .offsets = offsets, .token_ids = token_ids,
                   .out_ids = out_ids != NULL ? out_ids : token_ids, .has_out_ids = out_ids != NULL,
                   .pair_weights = pair_weights, .x = x, .out = out, .num_experts = num_experts,
                   .num_tokens = num_tokens, .x_dtype = x_dtype, .is_first_write = !accumulate};
    void *sums = out_dtype == OM_F32 ? NULL : out;
    if (!is_in_range(offsets, token_ids, num_experts, num_tokens)) return -2;
    om_pool_begin();
    plan(&job);
    uint8_t *arena = om_arena_reserve(lay_out(&job, &sums, 0));
    if (arena != NULL) {
        sums = out_dtype == OM_F32 ? NULL : out;
        lay_out(&job, &sums, (uintptr_t)arena);
        if (sums != NULL) job.out = sums;
        run_groups(&job);
        if (sums != NULL) convert_out(sums, out, num_tokens * layer->second.rows);
    }
    om_pool_end();
    return arena == NULL ? -1 : 0;
}

OM_APART static void sum_columns(const float *pairs, int64_t num_rows, int64_t num_columns, int64_t count, float *sums) {
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t c = 0; c < count; c++) sums[c] += pairs[r * num_columns + c];
}

/* out[H] = the rows of pairs[num_rows, H], added one after the other. */
OM_EXPORT void om_sum_rows(const float *pairs, int64_t num_rows, int64_t num_columns, void *out, int32_t out_dtype) {
    const uint64_t callers_mode = om_enter_float_mode();
    for (int64_t first = 0; first < num_columns; first += OM_BLOCK) {
        const int64_t count = om_min(OM_BLOCK, num_columns - first);
        float sums[OM_BLOCK] = {0};
        sum_columns(pairs + first, num_rows, num_columns, count, sums);
        if (out_dtype == OM_F32) memcpy((float *)out + first, sums, count * sizeof(float));
        else convert_out(sums, (uint16_t *)out + first, count);
    }
    om_restore_float_mode(callers_mode);
}
