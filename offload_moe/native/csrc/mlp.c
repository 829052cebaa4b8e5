/* A gated MLP that every token takes: down(activation(gate(x)) * up(x)), with the operations of an expert (`moe.c`).
 *
 * The three matrices lie in records of their own. T tokens, H hidden, I intermediate. */
#include "mlp.h"

#define GROUP_BYTES (16ll << 20) /* intermediate activations kept at once */

enum { GATE = 0, UP = 1, DOWN = 2 };

typedef struct {
    const om_mlp *mlp;
    const float *weights; /* [T], or NULL: `out` is set */
    om_linear_job first, second;
    void *parts[2]; /* gate and up [T, I] */
    float *hidden;  /* [T, I] */
    void *out, *results;
} mlp_job;

static void activate_unit(void *context, int64_t token, int64_t next, int thread) {
    (void)next, (void)thread;
    const mlp_job *job = context;
    const om_isa *isa = om_active_isa();
    const int64_t count = job->mlp->matrices[GATE].rows, at = token * count;
    (job->mlp->matrices[DOWN].part_rows ? isa->panels->activate : isa->activate)(
        job->mlp->activation, 0.0f, 0.0f, 1, (const float *)job->parts[GATE] + at, (const float *)job->parts[UP] + at,
        job->hidden + at, count);
}

static void lay_out(void *context, uintptr_t *cursor) {
    mlp_job *job = context;
    const int64_t num_tokens = job->first.num_tokens;
    const int64_t part_bytes = num_tokens * job->mlp->matrices[GATE].rows * (int64_t)sizeof(float);
    const int64_t result_bytes = num_tokens * job->mlp->matrices[DOWN].rows * (int64_t)sizeof(float);
    om_lay_out_linear(&job->first, cursor);
    om_lay_out_linear(&job->second, cursor);
    job->parts[GATE] = om_take(cursor, part_bytes);
    job->parts[UP] = om_take(cursor, part_bytes);
    job->hidden = om_take(cursor, part_bytes);
    job->results = job->weights == NULL ? job->out : om_take(cursor, result_bytes);
    job->second.x = job->hidden;
}

static void run(void *context) {
    mlp_job *job = context;
    const int64_t num_tokens = job->first.num_tokens, hidden = job->mlp->matrices[DOWN].rows;
    om_run_linear(&job->first);
    om_pool_run(activate_unit, job, num_tokens);
    om_run_linear(&job->second);
    if (job->weights == NULL) return;
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t i = t * hidden; i < (t + 1) * hidden; i++)
            ((float *)job->out)[i] += job->weights[t] * ((const float *)job->results)[i];
}

/* Some tokens; `out` as in `om_mlp_forward` or `om_mlp_add`. */
static int compute(const om_mlp *mlp, const void *x, int64_t num_tokens, int32_t x_dtype, const float *weights, void *out,
                   int32_t out_dtype) {
    mlp_job job = {.mlp = mlp, .weights = weights, .out = out};
    job.first = (om_linear_job){.matrices = mlp->matrices, .records = mlp->records, .outs = job.parts, .x = x,
                                .num_matrices = 2, .num_tokens = num_tokens, .x_dtype = x_dtype};
    job.second = (om_linear_job){.matrices = mlp->matrices + DOWN, .records = mlp->records + DOWN, .outs = &job.results,
                                 .num_matrices = 1, .num_tokens = num_tokens, .out_dtype = out_dtype};
    return om_call_in_arena(&job, lay_out, run);
}

/* out[T, H] = the MLP of x[T, H]. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_mlp_forward(const om_mlp *mlp, const void *x, int64_t num_tokens, int32_t x_dtype, void *out, int32_t out_dtype) {
    const int64_t hidden = mlp->matrices[DOWN].rows, bytes_per_token = 3 * mlp->matrices[GATE].rows * (int64_t)sizeof(float);
    const int64_t most = om_max(OM_TILE, GROUP_BYTES / bytes_per_token / OM_TILE * OM_TILE);
    for (int64_t first = 0; first < num_tokens; first += most) {
        const uint8_t *from = (const uint8_t *)x + first * hidden * (x_dtype == OM_F32 ? 4 : 2);
        uint8_t *to = (uint8_t *)out + first * hidden * (out_dtype == OM_F32 ? 4 : 2);
        if (compute(mlp, from, om_min(most, num_tokens - first), x_dtype, NULL, to, out_dtype) != 0) return -1;
    }
    return 0;
}

int om_mlp_add(const om_mlp *mlp, const float *x, int64_t num_tokens, const float *weights, float *out) {
    return compute(mlp, x, num_tokens, OM_F32, weights, out, OM_F32);
}
