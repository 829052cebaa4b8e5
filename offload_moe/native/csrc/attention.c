/* A decode step of grouped-query attention in one call: projections, head norms, rotary embedding, cache, attention, output.
 *
 * One token of one sequence, in fp32. N query heads, M key/value heads, D head dim, S cached tokens, C room in the cache. */
#include "job.h"

enum { QUERY = 0, KEY = 1, VALUE = 2, OUTPUT = 3 };

typedef struct {
    const om_attention *attention;
    const float *cos, *signed_sin;
    float *keys, *values; /* [M, C, D] */
    int64_t capacity, length, heads_per_unit;
    om_linear_job projections, output;
    void *heads[3]; /* query [N, D], key and value [M, D] */
    float *mixed;   /* [N, D] */
    float *scores;  /* per thread */
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
    const int64_t dim = job->attention->head_dim;
    for (int64_t head = 0; head < job->attention->num_kv_heads; head++) {
        const int64_t at = (head * job->capacity + job->length) * dim;
        __builtin_memcpy(job->keys + at, (const float *)job->heads[KEY] + head * dim, (size_t)dim * sizeof(float));
        __builtin_memcpy(job->values + at, (const float *)job->heads[VALUE] + head * dim, (size_t)dim * sizeof(float));
    }
}

static void heads_unit(void *context, int64_t unit, int64_t next, int thread) {
    (void)next;
    const attention_job *job = context;
    const om_attention *a = job->attention;
    const int64_t head = unit * job->heads_per_unit, dim = a->head_dim;
    const int64_t cached = head / (a->num_heads / a->num_kv_heads) * job->capacity * dim;
    om_active_isa()->attend((const float *)job->heads[QUERY] + head * dim, job->keys + cached, job->values + cached,
                            a->sinks == NULL ? NULL : a->sinks + head, job->heads_per_unit, dim, job->length + 1, a->scaling,
                            job->scores + thread * job->heads_per_unit * job->capacity, job->mixed + head * dim);
}

static void lay_out(void *context, uintptr_t *cursor) {
    attention_job *job = context;
    const om_attention *a = job->attention;
    const int64_t query_bytes = a->num_heads * a->head_dim * (int64_t)sizeof(float);
    const int64_t key_bytes = a->num_kv_heads * a->head_dim * (int64_t)sizeof(float);
    om_lay_out_linear(&job->projections, cursor);
    om_lay_out_linear(&job->output, cursor);
    job->heads[QUERY] = om_take(cursor, query_bytes);
    job->heads[KEY] = om_take(cursor, key_bytes);
    job->heads[VALUE] = om_take(cursor, key_bytes);
    job->mixed = om_take(cursor, query_bytes);
    job->scores = om_take(cursor, om_pool_threads() * job->heads_per_unit * job->capacity * (int64_t)sizeof(float));
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
    om_pool_run(heads_unit, job, a->num_heads / job->heads_per_unit);
    om_run_linear(&job->output);
    om_add_bias(job->out, a->biases[OUTPUT], a->matrices[OUTPUT].rows);
}

/* x[H] -> out[H]. cos and signed_sin: [rotated_dims]. Writes the token's keys and values at `length` of `keys` and `values`,
 * [M, capacity, D], and attends to `length` + 1 tokens. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_attention_step(const om_attention *attention, const float *x, const float *cos, const float *signed_sin,
                                float *keys, float *values, int64_t capacity, int64_t length, float *out) {
    const int64_t group = attention->num_heads / attention->num_kv_heads;
    attention_job job = {.attention = attention, .cos = cos, .signed_sin = signed_sin, .keys = keys, .values = values,
                         .capacity = capacity, .length = length, .out = out};
    /* heads that share keys are computed together where that leaves work for every thread */
    job.heads_per_unit = attention->num_kv_heads >= om_pool_threads() ? group : 1;
    job.projections = (om_linear_job){.matrices = attention->matrices, .records = attention->records, .outs = job.heads,
                                      .x = x, .num_matrices = 3, .num_tokens = 1};
    job.output = (om_linear_job){.matrices = attention->matrices + OUTPUT, .records = attention->records + OUTPUT,
                                 .outs = &job.out, .num_matrices = 1, .num_tokens = 1};
    return om_call_in_arena(&job, lay_out, run);
}
