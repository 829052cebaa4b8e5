/* A decode step of grouped-query attention in one call: projections, head norms, rotary embedding, cache, attention, output.
 *
 * T rows in fp32, each a token: their projections are computed together, and attention row by row. N query heads, M key/value
 * heads, D head dim, S cached tokens, C room in the cache. */
#include "attend_job.h"

enum { QUERY = 0, KEY = 1, VALUE = 2, OUTPUT = 3 };

typedef struct {
    const om_attention *attention;
    const float *cos, *signed_sin; /* [T, rotated_dims] */
    const om_room *rooms;          /* [T] */
    int64_t num_rows;
    om_linear_job projections, output;
    om_attend_rows attend;
    void *heads[3]; /* query [T, N, D], key and value [T, M, D] */
    float *mixed;   /* [T, N, D] */
    void *out;
} attention_job;

static void finish_heads(const attention_job *job, int which, int64_t num_heads, int64_t row) {
    const om_attention *a = job->attention;
    const int64_t dim = a->head_dim, count = num_heads * dim, turn = row * a->rotated_dims;
    float *values = (float *)job->heads[which] + row * count;
    om_add_bias(values, a->biases[which], count);
    if (which == VALUE) return;
    if (a->norms[which] != NULL)
        for (int64_t at = 0; at < count; at += a->norm_lengths[which])
            om_rms_norm(values + at, a->norms[which], a->norm_lengths[which], a->epsilons[which], values + at);
    for (int64_t at = 0; at < count; at += dim)
        om_rotate(values + at, job->cos + turn, job->signed_sin + turn, a->rotated_dims, a->rotation);
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

/* One head of one row. */
static void merge_unit(void *context, int64_t unit, int64_t next, int thread) {
    (void)next, (void)thread;
    const attention_job *job = context;
    const int64_t num_heads = job->attention->num_heads;
    om_merge_head(&job->attend.rows[unit / num_heads], unit % num_heads, job->mixed + unit * job->attention->head_dim);
}

static void attend_to_all(attention_job *job) {
    const int64_t num_units = job->num_rows * job->attention->num_heads;
    int is_long = 0;
    for (int64_t t = 0; t < job->num_rows; t++) is_long |= job->attend.rows[t].num_sections > 1;
    om_run_sections(&job->attend);
    if (is_long) {
        om_pool_run(merge_unit, job, num_units);
        return;
    }
    for (int64_t unit = 0; unit < num_units; unit++) merge_unit(job, unit, -1, 0); /* less than a wake-up costs */
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
    job->mixed = om_take(cursor, query_bytes);
    for (int64_t t = 0; t < job->num_rows; t++)
        job->attend.rows[t].queries = (const float *)job->heads[QUERY] + t * a->num_heads * a->head_dim;
    job->output.x = job->mixed;
}

static void run(void *context) {
    attention_job *job = context;
    const om_attention *a = job->attention;
    om_run_linear(&job->projections);
    for (int64_t t = 0; t < job->num_rows; t++) {
        finish_heads(job, QUERY, a->num_heads, t);
        finish_heads(job, KEY, a->num_kv_heads, t);
        finish_heads(job, VALUE, a->num_kv_heads, t);
        append(job, t);
    }
    attend_to_all(job);
    om_run_linear(&job->output);
    for (int64_t t = 0; t < job->num_rows; t++)
        om_add_bias((float *)job->out + t * a->matrices[OUTPUT].rows, a->biases[OUTPUT], a->matrices[OUTPUT].rows);
}

static om_attend_job attend_job(const om_attention *a, const om_room *room) {
    return (om_attend_job){.cached = {.keys = room->keys, .values = room->values, .dim = a->head_dim, .value_dim = a->head_dim,
                                      .scaling = a->scaling, .is_bf16 = a->cache_dtype == OM_BF16_VALUES},
                           .sinks = a->sinks, .num_heads = a->num_heads, .num_kv_heads = a->num_kv_heads,
                           .capacity = room->capacity, .length = room->length + 1};
}

/* x[T, H] -> out[T, H]. cos and signed_sin: [T, rotated_dims]. Writes the keys and values of each row at `length` of its room,
 * in the cache's dtype; then each row attends to `length` + 1 tokens of its room. Rows of one sequence have the same room, with
 * lengths that ascend by one. num_rows: OM_MAX_ROWS at most. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_attention_step(const om_attention *attention, const float *x, const float *cos, const float *signed_sin,
                                const om_room *rooms, int64_t num_rows, float *out) {
    const om_attention *a = attention;
    attention_job job = {.attention = a, .cos = cos, .signed_sin = signed_sin, .rooms = rooms, .num_rows = num_rows, .out = out};
    job.attend.num_rows = num_rows;
    for (int64_t t = 0; t < num_rows; t++) job.attend.rows[t] = attend_job(a, rooms + t);
    job.projections = (om_linear_job){.matrices = a->matrices, .records = a->records, .outs = job.heads,
                                      .x = x, .num_matrices = 3, .num_tokens = num_rows};
    job.output = (om_linear_job){.matrices = a->matrices + OUTPUT, .records = a->records + OUTPUT,
                                 .outs = &job.out, .num_matrices = 1, .num_tokens = num_rows};
    return om_call_in_arena(&job, lay_out, run);
}
