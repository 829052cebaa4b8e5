/* A decode step of latent attention in one call: projections, norms, rotary embedding, cache, attention, output.
 *
 * The cache holds one latent and one rotated key per token, for all heads. With k = W_k c and v = W_v c, scores are
 * (W_k^T q) . c, and the output is W_v times the mean of c: nothing is expanded. Source: DeepSeek-V2, arXiv:2405.04434.
 * T rows in fp32, each a token, with a cache of its own or of the row before it. N heads, K unrotated and P rotated dims, V value
 * dims, R rank. */
#include "attend_job.h"

enum { FIRST = 0, COMPRESS = 1, UP = 2, INNER = 3, EXPAND = 4, OUTPUT = 5 };
#define ROWS_AT_ONCE 64

typedef struct {
    const om_latent *latent;
    const float *cos, *signed_sin; /* [T, P] */
    const om_room *rooms;          /* [T]: latents and rotated keys */
    int64_t num_rows;
    om_linear_job first, compress, up, output;
    om_attend_rows attend;
    void *down;                   /* the query projected down, or the query */
    void *compressed;             /* latent and rotated key [T, R + P] */
    void *query;                  /* [T, N, K + P] */
    float *inner, *means, *mixed; /* [T, N, R + P], [T, N, R], [T, N, V] */
    void *out;
} latent_job;

static int64_t query_dims(const om_latent *l) { return l->unrotated_dims + l->rotated_dims; }

static void finish_query(const latent_job *job, int64_t row) {
    const om_latent *l = job->latent;
    float *query = (float *)job->query + row * l->num_heads * query_dims(l);
    const int64_t turn = row * l->rotated_dims;
    om_add_bias(query, l->biases[UP], l->num_heads * query_dims(l));
    for (int64_t n = 0; n < l->num_heads; n++)
        om_rotate(query + n * query_dims(l) + l->unrotated_dims, job->cos + turn, job->signed_sin + turn, l->rotated_dims,
                  l->rotation);
}

static void append(const latent_job *job, int64_t row) {
    const om_latent *l = job->latent;
    const om_room *room = job->rooms + row;
    const int is_bf16 = l->cache_dtype == OM_BF16_VALUES;
    float *compressed = (float *)job->compressed + row * (l->rank + l->rotated_dims);
    const int64_t turn = row * l->rotated_dims;
    om_add_bias(compressed, l->biases[COMPRESS], l->rank + l->rotated_dims);
    om_rms_norm(compressed, l->latent_norm, l->rank, l->latent_epsilon, compressed);
    om_rotate(compressed + l->rank, job->cos + turn, job->signed_sin + turn, l->rotated_dims, l->rotation);
    om_write_row(is_bf16, compressed, l->rank, room->keys, room->length);
    om_write_row(is_bf16, compressed + l->rank, l->rotated_dims, room->values, room->length);
}

static void project_up(latent_job *job) {
    const om_latent *l = job->latent;
    const int64_t dims = l->matrices[FIRST].rows;
    for (int64_t t = 0; t < job->num_rows; t++) {
        float *down = (float *)job->down + t * dims;
        om_add_bias(down, l->biases[FIRST], dims);
        om_rms_norm(down, l->query_norm, dims, l->query_epsilon, down);
    }
    om_run_linear(&job->up);
}

/* Vectors of all rows, which lie `apart` floats from each other. */
typedef struct {
    float *values;
    int64_t apart;
} row_vectors;

/* out[T][count] = `count` rows of the matrix from `first` on, times x[T]. */
static void multiply_rows(const latent_job *job, int which, int64_t first, int64_t count, row_vectors x, row_vectors out) {
    const om_weights w = om_resolve(&job->latent->matrices[which], job->latent->records[which]);
    const om_rows_fn rows = om_rows_of(w.codec);
    om_tile tile = {.num_tokens = om_tile_stride((int)job->num_rows)};
    for (int t = 0; t < tile.num_tokens; t++) tile.values[t] = x.values + om_min(t, job->num_rows - 1) * x.apart;
    float results[ROWS_AT_ONCE * OM_TILE];
    for (int64_t at = 0; at < count; at += ROWS_AT_ONCE) {
        const int64_t here = om_min(ROWS_AT_ONCE, count - at);
        rows(&w, first + at, here, &tile, results);
        for (int64_t t = 0; t < job->num_rows; t++)
            for (int64_t i = 0; i < here; i++) out.values[t * out.apart + at + i] = results[i * OM_TILE + t];
    }
}

/* One head's queries, moved into the latent space; their rotated parts stay. */
static void query_unit(void *context, int64_t head, int64_t next, int thread) {
    (void)next, (void)thread;
    const latent_job *job = context;
    const om_latent *l = job->latent;
    const int64_t dims = l->rank + l->rotated_dims;
    const row_vectors query = {(float *)job->query + head * query_dims(l), l->num_heads * query_dims(l)};
    const row_vectors inner = {job->inner + head * dims, l->num_heads * dims};
    multiply_rows(job, INNER, head * l->rank, l->rank, query, inner);
    for (int64_t t = 0; t < job->num_rows; t++)
        for (int64_t i = 0; i < l->rotated_dims; i++)
            inner.values[t * inner.apart + l->rank + i] = query.values[t * query.apart + l->unrotated_dims + i];
}

/* One head's means of latents -> its means of values. */
static void value_unit(void *context, int64_t head, int64_t next, int thread) {
    (void)next, (void)thread;
    const latent_job *job = context;
    const om_latent *l = job->latent;
    const row_vectors means = {job->means + head * l->rank, l->num_heads * l->rank};
    const row_vectors mixed = {job->mixed + head * l->value_dims, l->num_heads * l->value_dims};
    for (int64_t t = 0; t < job->num_rows; t++) om_merge_head(&job->attend.rows[t], head, means.values + t * means.apart);
    multiply_rows(job, EXPAND, head * (l->unrotated_dims + l->value_dims) + l->unrotated_dims, l->value_dims, means, mixed);
}

static void lay_out(void *context, uintptr_t *cursor) {
    latent_job *job = context;
    const om_latent *l = job->latent;
    const int64_t size = job->num_rows * (int64_t)sizeof(float), inner_dims = l->num_heads * (l->rank + l->rotated_dims);
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
    job->inner = om_take(cursor, inner_dims * size);
    for (int64_t t = 0; t < job->num_rows; t++) job->attend.rows[t].queries = job->inner + t * inner_dims;
    job->means = om_take(cursor, l->num_heads * l->rank * size);
    job->mixed = om_take(cursor, l->num_heads * l->value_dims * size);
    job->output.x = job->mixed;
}

static void run(void *context) {
    latent_job *job = context;
    const om_latent *l = job->latent;
    om_run_linear(&job->first);
    om_run_linear(&job->compress);
    if (l->query_norm != NULL) project_up(job);
    for (int64_t t = 0; t < job->num_rows; t++) {
        finish_query(job, t);
        append(job, t);
    }
    om_pool_run(query_unit, job, l->num_heads);
    om_run_sections(&job->attend);
    om_pool_run(value_unit, job, l->num_heads);
    om_run_linear(&job->output);
    for (int64_t t = 0; t < job->num_rows; t++)
        om_add_bias((float *)job->out + t * l->matrices[OUTPUT].rows, l->biases[OUTPUT], l->matrices[OUTPUT].rows);
}

static om_linear_job linear_job(const latent_job *job, int which, void *const *out) {
    return (om_linear_job){.matrices = job->latent->matrices + which, .records = job->latent->records + which, .outs = out,
                           .num_matrices = 1, .num_tokens = job->num_rows};
}

static om_attend_job attend_job(const om_latent *l, const om_room *room) {
    return (om_attend_job){.cached = {.keys = room->keys, .more_keys = room->values, .values = room->keys, .dim = l->rank,
                                      .more_dim = l->rotated_dims, .value_dim = l->rank, .scaling = l->scaling,
                                      .is_bf16 = l->cache_dtype == OM_BF16_VALUES},
                           .num_heads = l->num_heads, .num_kv_heads = 1, .length = room->length + 1};
}

/* As `om_attention_step`: x[T, H] -> out[T, H]; cos and signed_sin [T, P]; a room's keys are latents [C, R], its values rotated
 * keys [C, P]. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_latent_step(const om_latent *latent, const float *x, const float *cos, const float *signed_sin,
                             const om_room *rooms, int64_t num_rows, float *out) {
    latent_job job = {.latent = latent, .cos = cos, .signed_sin = signed_sin, .rooms = rooms, .num_rows = num_rows, .out = out};
    job.attend.num_rows = num_rows;
    for (int64_t t = 0; t < num_rows; t++) job.attend.rows[t] = attend_job(latent, rooms + t);
    job.first = linear_job(&job, FIRST, &job.down);
    job.compress = linear_job(&job, COMPRESS, &job.compressed);
    job.first.x = job.compress.x = x;
    job.up = linear_job(&job, UP, &job.query);
    job.output = linear_job(&job, OUTPUT, &job.out);
    return om_call_in_arena(&job, lay_out, run);
}
