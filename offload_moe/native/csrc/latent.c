/* Latent attention in one call: projections, norms, rotary embedding, cache, attention, output.
 *
 * The cache holds one latent and one rotated key per token, for all heads. With k = W_k c and v = W_v c, scores are
 * (W_k^T q) . c, and the output is W_v times the mean of c: nothing is expanded. Source: DeepSeek-V2, arXiv:2405.04434.
 * T rows in fp32, each a token, of decode steps or of a prompt: the bits of each row alone. N heads, K unrotated and P rotated dims, V value
 * dims, R rank. */
#include "attend_job.h"

enum { FIRST = 0, COMPRESS = 1, UP = 2, INNER = 3, EXPAND = 4, OUTPUT = 5 };
#define ROWS_AT_ONCE 64

typedef struct {
    const om_latent *latent;
    const float *cos, *signed_sin; /* [T, P] */
    const om_room *rooms;          /* [T]: latents and rotated keys */
    int64_t num_rows;
    const float *x;
    om_linear_job first, compress, up, output;
    om_attend attend;
    void *down;                   /* the query projected down, or the query */
    void *compressed;             /* latent and rotated key [T, R + P] */
    void *query;                  /* [T, N, K + P] */
    float *inner, *mixed;         /* [T, N, R + P], [T, N, V] */
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
    om_norm_rows(compressed, l->latent_norm, 1, l->rank, l->latent_epsilon, compressed);
    om_rotate(compressed + l->rank, job->cos + turn, job->signed_sin + turn, l->rotated_dims, l->rotation);
    om_write_row(is_bf16, compressed, l->rank, room->keys, room->length);
    om_write_row(is_bf16, compressed + l->rank, l->rotated_dims, room->values, room->length);
}

static void row_unit(void *context, int64_t row, int64_t next, int thread) {
    (void)next, (void)thread;
    finish_query(context, row);
    append(context, row);
}

static void down_unit(void *context, int64_t row, int64_t next, int thread) {
    (void)next, (void)thread;
    const latent_job *job = context;
    const om_latent *l = job->latent;
    const int64_t dims = l->matrices[FIRST].rows;
    float *down = (float *)job->down + row * dims;
    om_add_bias(down, l->biases[FIRST], dims);
    om_norm_rows(down, l->query_norm, 1, dims, l->query_epsilon, down);
}

/* Vectors of all rows, which lie `apart` floats from each other. */
typedef struct {
    float *values;
    int64_t apart;
} row_vectors;

/* out[num_vectors][count] = `count` rows of the matrix from `first` on, times x[num_vectors], a tile's vectors. */
static void multiply_tile(const om_weights *w, int64_t first, int64_t count, int64_t num_vectors, row_vectors x, row_vectors out) {
    const om_rows_fn rows = om_rows_of(w->codec);
    om_tile tile = {.num_tokens = om_tile_stride((int)num_vectors)};
    for (int t = 0; t < tile.num_tokens; t++) tile.values[t] = x.values + om_min(t, num_vectors - 1) * x.apart;
    float results[ROWS_AT_ONCE * OM_TILE];
    for (int64_t at = 0; at < count; at += ROWS_AT_ONCE) {
        const int64_t here = om_min(ROWS_AT_ONCE, count - at);
        rows(w, first + at, here, &tile, results);
        for (int64_t t = 0; t < num_vectors; t++)
            for (int64_t i = 0; i < here; i++) out.values[t * out.apart + at + i] = results[i * OM_TILE + t];
    }
}

/* Of all rows. */
static void multiply_rows(const latent_job *job, int which, int64_t first, int64_t count, row_vectors x, row_vectors out) {
    const om_weights w = om_resolve(&job->latent->matrices[which], job->latent->records[which]);
    for (int64_t t = 0; t < job->num_rows; t += OM_TILE, x.values += OM_TILE * x.apart, out.values += OM_TILE * out.apart)
        multiply_tile(&w, first, count, om_min(OM_TILE, job->num_rows - t), x, out);
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
    const row_vectors means = {job->attend.out + head * l->rank, l->num_heads * l->rank};
    const row_vectors mixed = {job->mixed + head * l->value_dims, l->num_heads * l->value_dims};
    for (int64_t t = 0; !job->attend.is_in_blocks && t < job->num_rows; t++) om_merge_head(&job->attend, t, head);
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
    job->attend.queries = job->inner = om_take(cursor, inner_dims * size);
    job->attend.out = om_take(cursor, l->num_heads * l->rank * size);
    job->mixed = om_take(cursor, l->num_heads * l->value_dims * size);
    job->output.x = job->mixed;
}

static void run(void *context) {
    latent_job *job = context;
    const om_latent *l = job->latent;
    om_run_linear(&job->first);
    om_run_linear(&job->compress);
    if (l->query_norm != NULL) {
        om_run_rows(down_unit, job, job->num_rows);
        om_run_linear(&job->up);
    }
    om_run_rows(row_unit, job, job->num_rows);
    om_pool_run(query_unit, job, l->num_heads);
    om_run_attend(&job->attend);
    om_pool_run(value_unit, job, l->num_heads);
    om_run_linear(&job->output);
    for (int64_t t = 0; t < job->num_rows; t++)
        om_add_bias((float *)job->out + t * l->matrices[OUTPUT].rows, l->biases[OUTPUT], l->matrices[OUTPUT].rows);
}

static om_linear_job linear_job(const latent_job *job, int which, void *const *out) {
    return (om_linear_job){.matrices = job->latent->matrices + which, .records = job->latent->records + which, .outs = out,
                           .num_matrices = 1, .num_tokens = job->num_rows};
}

static int compute(latent_job job) {
    const om_latent *l = job.latent;
    job.attend = (om_attend){.cached = {.dim = l->rank, .more_dim = l->rotated_dims, .value_dim = l->rank, .scaling = l->scaling,
                                        .is_bf16 = l->cache_dtype == OM_BF16_VALUES},
                             .rooms = job.rooms, .num_rows = job.num_rows, .num_heads = l->num_heads, .num_kv_heads = 1};
    job.first = linear_job(&job, FIRST, &job.down);
    job.compress = linear_job(&job, COMPRESS, &job.compressed);
    job.first.x = job.compress.x = job.x;
    job.up = linear_job(&job, UP, &job.query);
    job.output = linear_job(&job, OUTPUT, &job.out);
    return om_call_in_arena(&job, lay_out, run);
}

/* As `om_attention_step`: x[T, H] -> out[T, H]; cos and signed_sin [T, P]; a room's keys are latents [C, R], its values rotated
 * keys [C, P]. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_latent_step(const om_latent *latent, const float *x, const float *cos, const float *signed_sin,
                             const om_room *rooms, int64_t num_rows, float *out) {
    const om_latent *l = latent;
    const int64_t most = om_rows_at_once(l->num_heads * (2 * l->rank + l->rotated_dims) * (int64_t)sizeof(float));
    for (int64_t first = 0; first < num_rows; first += most) {
        const latent_job job = {.latent = l, .cos = cos + first * l->rotated_dims, .signed_sin = signed_sin + first * l->rotated_dims,
                                .rooms = rooms + first, .num_rows = om_min(most, num_rows - first),
                                .x = x + first * l->matrices[FIRST].cols, .out = out + first * l->matrices[OUTPUT].rows};
        if (compute(job) != 0) return -1;
    }
    return 0;
}
