/* A decode step of latent attention in one call: projections, norms, rotary embedding, cache, attention, output.
 *
 * The cache holds one latent and one rotated key per token, for all heads. With k = W_k c and v = W_v c, scores are
 * (W_k^T q) . c, and the output is W_v times the mean of c: nothing is expanded. Source: DeepSeek-V2, arXiv:2405.04434.
 * One token of one sequence, in fp32. N heads, K unrotated and P rotated dims, V value dims, R rank. */
#include "attend_job.h"

enum { FIRST = 0, COMPRESS = 1, UP = 2, INNER = 3, EXPAND = 4, OUTPUT = 5 };
#define ROWS_AT_ONCE 64

typedef struct {
    const om_latent *latent;
    const float *cos, *signed_sin;
    void *latents, *rotated; /* [length + 1, R], [length + 1, P] */
    int64_t length;
    om_linear_job first, compress, up, output;
    om_attend_job attend;
    void *down;                   /* the query projected down, or the query */
    void *compressed;             /* latent and rotated key [R + P] */
    void *query;                  /* [N, K + P] */
    float *inner, *means, *mixed; /* [N, R + P], [N, R], [N, V] */
    void *out;
} latent_job;

static int64_t query_dims(const om_latent *l) { return l->unrotated_dims + l->rotated_dims; }

static void finish_projections(latent_job *job) {
    const om_latent *l = job->latent;
    float *down = job->down, *compressed = job->compressed, *query = job->query;
    om_add_bias(down, l->biases[FIRST], l->matrices[FIRST].rows);
    om_add_bias(compressed, l->biases[COMPRESS], l->rank + l->rotated_dims);
    if (l->query_norm != NULL) {
        om_rms_norm(down, l->query_norm, l->matrices[FIRST].rows, l->query_epsilon, down);
        om_run_linear(&job->up);
        om_add_bias(query, l->biases[UP], l->matrices[UP].rows);
    }
    for (int64_t n = 0; n < l->num_heads; n++)
        om_rotate(query + n * query_dims(l) + l->unrotated_dims, job->cos, job->signed_sin, l->rotated_dims, l->rotation);
    om_rms_norm(compressed, l->latent_norm, l->rank, l->latent_epsilon, compressed);
    om_rotate(compressed + l->rank, job->cos, job->signed_sin, l->rotated_dims, l->rotation);
    om_write_row(job->attend.cached.is_bf16, compressed, l->rank, job->latents, job->length);
    om_write_row(job->attend.cached.is_bf16, compressed + l->rank, l->rotated_dims, job->rotated, job->length);
}

/* out[num_rows] = rows of the matrix from `first_row` on, times x. */
static void multiply_rows(const om_latent *l, int which, int64_t first_row, int64_t num_rows, const float *x, float *out) {
    const om_weights w = om_resolve(&l->matrices[which], l->records[which]);
    const om_rows_fn rows = om_active_isa()->rows[w.codec];
    const om_tile tile = {.values = {(float *)x}, .num_tokens = 1};
    float results[ROWS_AT_ONCE * OM_TILE];
    for (int64_t at = 0; at < num_rows; at += ROWS_AT_ONCE) {
        const int64_t count = om_min(ROWS_AT_ONCE, num_rows - at);
        rows(&w, first_row + at, count, &tile, results);
        for (int64_t i = 0; i < count; i++) out[at + i] = results[i * OM_TILE];
    }
}

/* One head's query, moved into the latent space; its rotated part stays. */
static void query_unit(void *context, int64_t head, int64_t next, int thread) {
    (void)next, (void)thread;
    const latent_job *job = context;
    const om_latent *l = job->latent;
    const float *query = (const float *)job->query + head * query_dims(l);
    float *inner = job->inner + head * (l->rank + l->rotated_dims);
    multiply_rows(l, INNER, head * l->rank, l->rank, query, inner);
    for (int64_t i = 0; i < l->rotated_dims; i++) inner[l->rank + i] = query[l->unrotated_dims + i];
}

/* One head's mean of latents -> its mean of values. */
static void value_unit(void *context, int64_t head, int64_t next, int thread) {
    (void)next, (void)thread;
    const latent_job *job = context;
    const om_latent *l = job->latent;
    float *mean = job->means + head * l->rank;
    om_merge_head(&job->attend, head, mean);
    multiply_rows(l, EXPAND, head * (l->unrotated_dims + l->value_dims) + l->unrotated_dims, l->value_dims, mean,
                  job->mixed + head * l->value_dims);
}

static void lay_out(void *context, uintptr_t *cursor) {
    latent_job *job = context;
    const om_latent *l = job->latent;
    const int64_t size = sizeof(float);
    om_lay_out_linear(&job->first, cursor);
    om_lay_out_linear(&job->compress, cursor);
    om_lay_out_linear(&job->output, cursor);
    job->query = job->down = om_take(cursor, l->matrices[FIRST].rows * size);
    job->compressed = om_take(cursor, (l->rank + l->rotated_dims) * size);
    if (l->query_norm != NULL) {
        om_lay_out_linear(&job->up, cursor);
        job->query = om_take(cursor, l->num_heads * query_dims(l) * size);
        job->up.x = job->down;
    }
    om_lay_out_attend(&job->attend, cursor);
    job->attend.queries = job->inner = om_take(cursor, l->num_heads * (l->rank + l->rotated_dims) * size);
    job->means = om_take(cursor, l->num_heads * l->rank * size);
    job->mixed = om_take(cursor, l->num_heads * l->value_dims * size);
    job->output.x = job->mixed;
}

static void run(void *context) {
    latent_job *job = context;
    const om_latent *l = job->latent;
    om_run_linear(&job->first);
    om_run_linear(&job->compress);
    finish_projections(job);
    om_pool_run(query_unit, job, l->num_heads);
    om_run_sections(&job->attend);
    om_pool_run(value_unit, job, l->num_heads);
    om_run_linear(&job->output);
    om_add_bias(job->out, l->biases[OUTPUT], l->matrices[OUTPUT].rows);
}

static om_linear_job linear_job(const om_latent *l, int which, void *const *out) {
    return (om_linear_job){.matrices = l->matrices + which, .records = l->records + which, .outs = out,
                           .num_matrices = 1, .num_tokens = 1};
}

/* x[H] -> out[H]. cos and signed_sin: [P]. Writes the token's latent and rotated key at `length` of `latents` [length + 1, R]
 * and `rotated` [length + 1, P], in the cache's dtype, and attends to `length` + 1 tokens. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_latent_step(const om_latent *latent, const float *x, const float *cos, const float *signed_sin, void *latents,
                             void *rotated, int64_t length, float *out) {
    const om_latent *l = latent;
    latent_job job = {.latent = l, .cos = cos, .signed_sin = signed_sin, .latents = latents, .rotated = rotated,
                      .length = length, .out = out};
    job.attend = (om_attend_job){.cached = {.keys = latents, .more_keys = rotated, .values = latents, .dim = l->rank,
                                            .more_dim = l->rotated_dims, .value_dim = l->rank, .scaling = l->scaling,
                                            .is_bf16 = l->cache_dtype == OM_BF16_VALUES},
                                 .num_heads = l->num_heads, .num_kv_heads = 1, .length = length + 1};
    job.first = linear_job(l, FIRST, &job.down);
    job.compress = linear_job(l, COMPRESS, &job.compressed);
    job.first.x = job.compress.x = x;
    job.up = linear_job(l, UP, &job.query);
    job.output = linear_job(l, OUTPUT, &job.out);
    return om_call_in_arena(&job, lay_out, run);
}
