/* A decode step of grouped-query attention in one call: projections, head norms, rotary embedding, cache, attention, output.
 *
 * One token of one sequence, in fp32. N query heads, M key/value heads, D head dim, S cached tokens, C room in the cache. */
#include "attend_job.h"

enum { QUERY = 0, KEY = 1, VALUE = 2, OUTPUT = 3 };

typedef struct {
    const om_attention *attention;
    const float *cos, *signed_sin;
    void *keys, *values; /* [M, C, D] */
    int64_t length;
    om_linear_job projections, output;
    om_attend_job attend;
    void *heads[3]; /* query [N, D], key and value [M, D] */
    float *mixed;   /* [N, D] */
    void *out;
} attention_job;

static void finish_heads(const attention_job *job, int which, int64_t num_heads) {
    const om_attention *a = job->attention;
    const int64_t dim = a->head_dim, count = num_heads * dim;
    float *values = job->heads[which];
    om_add_bias(values, a->biases[which], count);
    if (which == VALUE) return;
    if (a->norms[which] != NULL)
        for (int64_t at = 0; at < count; at += a->norm_lengths[which])
            om_rms_norm(values + at, a->norms[which], a->norm_lengths[which], a->epsilons[which], values + at);
    for (int64_t at = 0; at < count; at += dim)
        om_rotate(values + at, job->cos, job->signed_sin, a->rotated_dims, a->rotation);
}

static void append(const attention_job *job) {
    const om_attention *a = job->attention;
    const int is_bf16 = a->cache_dtype == OM_BF16_VALUES;
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        const int64_t row = head * job->attend.capacity + job->length, at = head * a->head_dim;
        om_write_row(is_bf16, (const float *)job->heads[KEY] + at, a->head_dim, job->keys, row);
        om_write_row(is_bf16, (const float *)job->heads[VALUE] + at, a->head_dim, job->values, row);
    }
}

static void merge_unit(void *context, int64_t unit, int64_t next, int thread) {
    (void)next, (void)thread;
    const attention_job *job = context;
    om_merge_head(&job->attend, unit, job->mixed + unit * job->attention->head_dim);
}

static void attend_to_all(attention_job *job) {
    om_run_sections(&job->attend);
    if (job->attend.num_sections > 1) {
        om_pool_run(merge_unit, job, job->attention->num_heads);
        return;
    }
    for (int64_t head = 0; head < job->attention->num_heads; head++) merge_unit(job, head, -1, 0); /* less than a wake-up costs */
}

static void lay_out(void *context, uintptr_t *cursor) {
    attention_job *job = context;
    const om_attention *a = job->attention;
    const int64_t query_bytes = a->num_heads * a->head_dim * (int64_t)sizeof(float);
    const int64_t key_bytes = a->num_kv_heads * a->head_dim * (int64_t)sizeof(float);
    om_lay_out_linear(&job->projections, cursor);
    om_lay_out_linear(&job->output, cursor);
    om_lay_out_attend(&job->attend, cursor);
    job->heads[QUERY] = om_take(cursor, query_bytes);
    job->heads[KEY] = om_take(cursor, key_bytes);
    job->heads[VALUE] = om_take(cursor, key_bytes);
    job->mixed = om_take(cursor, query_bytes);
    job->attend.queries = job->heads[QUERY];
    job->output.x = job->mixed;
}

static void run(void *context) {
    attention_job *job = context;
    const om_attention *a = job->attention;
    om_run_linear(&job->projections);
    finish_heads(job, QUERY, a->num_heads);
    finish_heads(job, KEY, a->num_kv_heads);
    finish_heads(job, VALUE, a->num_kv_heads);
    append(job);
    attend_to_all(job);
    om_run_linear(&job->output);
    om_add_bias(job->out, a->biases[OUTPUT], a->matrices[OUTPUT].rows);
}

/* x[H] -> out[H]. cos and signed_sin: [rotated_dims]. Writes the token's keys and values at `length` of `keys` and `values`,
 * [M, capacity, D] in the cache's dtype, and attends to `length` + 1 tokens. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_attention_step(const om_attention *attention, const float *x, const float *cos, const float *signed_sin,
                                void *keys, void *values, int64_t capacity, int64_t length, float *out) {
    const om_attention *a = attention;
    attention_job job = {.attention = a, .cos = cos, .signed_sin = signed_sin, .keys = keys, .values = values,
                         .length = length, .out = out};
    job.attend = (om_attend_job){.cached = {.keys = keys, .values = values, .dim = a->head_dim, .value_dim = a->head_dim,
                                            .scaling = a->scaling, .is_bf16 = a->cache_dtype == OM_BF16_VALUES},
                                 .sinks = a->sinks, .num_heads = a->num_heads, .num_kv_heads = a->num_kv_heads,
                                 .capacity = capacity, .length = length + 1};
    job.projections = (om_linear_job){.matrices = a->matrices, .records = a->records, .outs = job.heads,
                                      .x = x, .num_matrices = 3, .num_tokens = 1};
    job.output = (om_linear_job){.matrices = a->matrices + OUTPUT, .records = a->records + OUTPUT,
                                 .outs = &job.out, .num_matrices = 1, .num_tokens = 1};
    return om_call_in_arena(&job, lay_out, run);
}
