/* Grouped-query attention in one call: projections, head norms, rotary embedding, cache, attention, output.
 *
 * T rows in fp32, each a token, of decode steps or of a prompt: the bits of each row alone. N query heads, M key/value heads, D head
 * dim, S cached tokens, C room in the cache. */
#include "arithmetic.h"
#include "attend_job.h"

#include <string.h>

enum { QUERY = 0, KEY = 1, VALUE = 2, OUTPUT = 3 };

typedef struct {
    const om_attention *attention;
    const float *cos, *signed_sin; /* [T, rotated_dims] */
    const om_room *rooms;          /* [T] */
    int64_t num_rows;
    const float *x;
    om_linear_job projections, output;
    om_attend attend;
    void *heads[3]; /* query [T, N, D], key and value [T, M, D] */
    void *projected[3]; /* the same; of gated attention the first is [T, N, 2, D] */
    float *gates; /* [T, N, D] of gated attention */
    void *out;
} attention_job;

/* A row's queries, and the sigmoids of its gates. */
static void split_gates(const attention_job *job, int64_t row) {
    const om_attention *a = job->attention;
    const int64_t dim = a->head_dim, count = a->num_heads * dim;
    float *from = (float *)job->projected[QUERY] + row * 2 * count, *gates = job->gates + row * count;
    float *queries = (float *)job->heads[QUERY] + row * count;
    om_add_bias(from, a->biases[QUERY], 2 * count);
    for (int64_t at = 0; at < count; at += dim, from += 2 * dim) {
        memcpy(queries + at, from, (size_t)dim * sizeof(float));
        memcpy(gates + at, from + dim, (size_t)dim * sizeof(float));
    }
    om_active_isa()->vectors->sigmoids(gates, count);
}

static void norm_heads(const om_attention *a, int which, float *values, int64_t count) {
    const int64_t length = a->norm_lengths[which];
    if (a->norms[which] != NULL) om_norm_rows(values, a->norms[which], count / length, length, a->epsilons[which], values);
}

/* Of a token behind so many others. */
static float query_scale(const om_attention *a, int64_t position) {
    const float steps = floorf((float)(position + 1) / a->scale_step);
    return a->scale_strength * om_log(steps + 1.0f) + 1.0f;
}

static void finish_heads(const attention_job *job, int which, int64_t num_heads, int64_t row) {
    const om_attention *a = job->attention;
    const int64_t dim = a->head_dim, count = num_heads * dim, turn = row * a->rotated_dims;
    float *values = (float *)job->heads[which] + row * count;
    if (which == QUERY && a->is_gated) split_gates(job, row);
    else om_add_bias(values, a->biases[which], count);
    if (which == VALUE) return;
    if (!a->is_normed_rotated) norm_heads(a, which, values, count);
    for (int64_t at = 0; at < count; at += dim)
        om_rotate(values + at, job->cos + turn, job->signed_sin + turn, a->rotated_dims, a->rotation);
    if (a->is_normed_rotated) norm_heads(a, which, values, count);
    if (which != QUERY || a->scale_step == 0.0f) return;
    const float scale = query_scale(a, job->rooms[row].length);
    for (int64_t i = 0; i < count; i++) values[i] *= scale;
}

static void append(const attention_job *job, int64_t row) {
    const om_attention *a = job->attention;
    const om_room *room = job->rooms + row;
    const int is_bf16 = a->cache_dtype == OM_BF16_VALUES;
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        const int64_t to = head * room->capacity + room->length, at = (row * a->num_kv_heads + head) * a->head_dim;
        om_write_row(is_bf16, (const float *)job->heads[KEY] + at, a->head_dim, room->keys, to);
        om_write_row(is_bf16, (const float *)job->heads[VALUE] + at, a->head_dim, room->values, to);
    }
}

static void row_unit(void *context, int64_t row, int64_t next, int thread) {
    (void)next, (void)thread;
    const attention_job *job = context;
    finish_heads(job, QUERY, job->attention->num_heads, row);
    finish_heads(job, KEY, job->attention->num_kv_heads, row);
    finish_heads(job, VALUE, job->attention->num_kv_heads, row);
    append(job, row);
}

/* One head of one row. */
static void merge_unit(void *context, int64_t unit, int64_t next, int thread) {
    (void)next, (void)thread;
    const om_attend *attend = context;
    om_merge_head(attend, unit / attend->num_heads, unit % attend->num_heads);
}

static void attend_to_all(om_attend *attend) {
    const int64_t num_units = attend->num_rows * attend->num_heads;
    int is_long = 0;
    om_run_attend(attend);
    if (attend->is_in_blocks) return;
    for (int64_t t = 0; t < attend->num_rows; t++) is_long |= attend->rows[t].num_sections > 1;
    if (is_long) {
        om_pool_run(merge_unit, attend, num_units);
        return;
    }
    for (int64_t unit = 0; unit < num_units; unit++) merge_unit(attend, unit, -1, 0); /* less than a wake-up costs */
}

static void lay_out(void *context, uintptr_t *cursor) {
    attention_job *job = context;
    const om_attention *a = job->attention;
    const int64_t query_bytes = job->num_rows * a->num_heads * a->head_dim * (int64_t)sizeof(float);
    const int64_t key_bytes = job->num_rows * a->num_kv_heads * a->head_dim * (int64_t)sizeof(float);
    om_lay_out_linear(&job->projections, cursor);
    om_lay_out_linear(&job->output, cursor);
    om_lay_out_attend(&job->attend, cursor);
    job->heads[QUERY] = om_take(cursor, query_bytes);
    job->heads[KEY] = om_take(cursor, key_bytes);
    job->heads[VALUE] = om_take(cursor, key_bytes);
    for (int which = QUERY; which <= VALUE; which++) job->projected[which] = job->heads[which];
    if (a->is_gated) {
        job->projected[QUERY] = om_take(cursor, 2 * query_bytes);
        job->gates = om_take(cursor, query_bytes);
    }
    job->attend.queries = job->heads[QUERY];
    job->output.x = job->attend.out = om_take(cursor, query_bytes);
}

static void gate_unit(void *context, int64_t row, int64_t next, int thread) {
    (void)next, (void)thread;
    const attention_job *job = context;
    const int64_t count = job->attention->num_heads * job->attention->head_dim;
    for (int64_t i = row * count; i < (row + 1) * count; i++) job->attend.out[i] *= job->gates[i];
}

static void run(void *context) {
    attention_job *job = context;
    const om_attention *a = job->attention;
    om_run_linear(&job->projections);
    om_run_rows(row_unit, job, job->num_rows);
    attend_to_all(&job->attend);
    if (a->is_gated) om_run_rows(gate_unit, job, job->num_rows);
    om_run_linear(&job->output);
    for (int64_t t = 0; t < job->num_rows; t++)
        om_add_bias((float *)job->out + t * a->matrices[OUTPUT].rows, a->biases[OUTPUT], a->matrices[OUTPUT].rows);
}

static om_attend attend_of(const om_attention *a, const om_room *rooms, int64_t num_rows) {
    return (om_attend){.cached = {.dim = a->head_dim, .value_dim = a->head_dim, .scaling = a->scaling,
                                  .is_bf16 = a->cache_dtype == OM_BF16_VALUES},
                       .rooms = rooms, .sinks = a->sinks, .num_rows = num_rows, .num_heads = a->num_heads,
                       .num_kv_heads = a->num_kv_heads};
}

static int64_t rows_at_once(const om_attention *a) {
    const int64_t num_heads = (a->is_gated ? 5 : 2) * a->num_heads + 2 * a->num_kv_heads;
    return om_rows_at_once(num_heads * a->head_dim * (int64_t)sizeof(float));
}

static int compute(attention_job job) {
    const om_attention *a = job.attention;
    job.attend = attend_of(a, job.rooms, job.num_rows);
    job.projections = (om_linear_job){.matrices = a->matrices, .records = a->records, .outs = job.projected,
                                      .x = job.x, .num_matrices = 3, .num_tokens = job.num_rows};
    job.output = (om_linear_job){.matrices = a->matrices + OUTPUT, .records = a->records + OUTPUT,
                                 .outs = &job.out, .num_matrices = 1, .num_tokens = job.num_rows};
    return om_call_in_arena(&job, lay_out, run);
}

/* x[T, H] -> out[T, H]. cos and signed_sin: [T, rotated_dims]. Writes the keys and values of each row at `length` of its room,
 * in the cache's dtype; then each row attends to `length` + 1 tokens of its room. Rows of one sequence have the same room, with
 * lengths that ascend by one, or rooms that begin later in the same memory. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_attention_step(const om_attention *attention, const float *x, const float *cos, const float *signed_sin,
                                const om_room *rooms, int64_t num_rows, float *out) {
    const om_attention *a = attention;
    const int64_t most = rows_at_once(a);
    for (int64_t first = 0; first < num_rows; first += most) {
        const attention_job job = {.attention = a, .cos = cos + first * a->rotated_dims, .rooms = rooms + first,
                                   .signed_sin = signed_sin + first * a->rotated_dims, .num_rows = om_min(most, num_rows - first),
                                   .x = x + first * a->matrices[QUERY].cols, .out = out + first * a->matrices[OUTPUT].rows};
        if (compute(job) != 0) return -1;
    }
    return 0;
}

static void lay_out_alone(void *attend, uintptr_t *cursor) { om_lay_out_attend(attend, cursor); }
static void run_alone(void *attend) { attend_to_all(attend); }

/* out[T, N, D] = what queries[T, N, D] attend to: `length` + 1 tokens of their rooms. Rooms are as in `om_attention_step`, and hold
 * the keys and values of all rows already. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_attend_rows(const om_attention *attention, const float *queries, const om_room *rooms, int64_t num_rows,
                             float *out) {
    const int64_t most = rows_at_once(attention), width = attention->num_heads * attention->head_dim;
    for (int64_t first = 0; first < num_rows; first += most) {
        om_attend attend = attend_of(attention, rooms + first, om_min(most, num_rows - first));
        attend.queries = queries + first * width;
        attend.out = out + first * width;
        if (om_call_in_arena(&attend, lay_out_alone, run_alone) != 0) return -1;
    }
    return 0;
}
