/* Linear attention in one call: projections, the gated delta rule, output projection.
 *
 * T rows in fp32, each the next token of a sequence of its own: the bits of each row alone. */
#include "job.h"
#include "vector_set.h"

#define MOST_INPUTS 4

typedef struct {
    const om_linear_attention *layer;
    const om_room *rooms; /* [T] */
    int64_t num_rows;
    om_linear_job projections[MOST_INPUTS], output;
    void *projected[MOST_INPUTS];
    float *mixed; /* [T, H * value_dim] */
    void *out;
} attention_job;

static const float *find(const attention_job *job, int64_t row, int field) {
    const om_linear_attention *layer = job->layer;
    const int64_t source = layer->sources[field];
    return (const float *)job->projected[source] + row * layer->inputs[source].rows + layer->offsets[field];
}

/* A head of keys of one row. */
static void heads_unit(void *context, int64_t unit, int64_t next, int thread) {
    (void)next, (void)thread;
    const attention_job *job = context;
    const om_delta *rule = &job->layer->rule;
    const int64_t row = unit / rule->num_key_heads, *strides = job->layer->strides;
    const om_delta_inputs inputs = {find(job, row, 0), find(job, row, 1), find(job, row, 2), find(job, row, 3), find(job, row, 4),
                                    find(job, row, 5), {strides[0], strides[1], strides[2], strides[3]}};
    om_active_isa()->vectors->delta_heads(rule, &inputs, unit % rule->num_key_heads, job->rooms[row].keys, job->rooms[row].values,
                                          job->mixed + row * rule->num_heads * rule->value_dim);
}

static void lay_out(void *context, uintptr_t *cursor) {
    attention_job *job = context;
    const om_linear_attention *layer = job->layer;
    for (int64_t i = 0; i < layer->num_inputs; i++) {
        om_lay_out_linear(&job->projections[i], cursor);
        job->projected[i] = om_take(cursor, job->num_rows * layer->inputs[i].rows * (int64_t)sizeof(float));
    }
    om_lay_out_linear(&job->output, cursor);
    job->mixed = om_take(cursor, job->num_rows * layer->output.cols * (int64_t)sizeof(float));
    job->output.x = job->mixed;
}

static void run(void *context) {
    attention_job *job = context;
    for (int64_t i = 0; i < job->layer->num_inputs; i++) om_run_linear(&job->projections[i]);
    om_pool_run(heads_unit, job, job->num_rows * job->layer->rule.num_key_heads);
    om_run_linear(&job->output);
}

/* x[T, hidden] -> out[T, hidden]. The rooms hold what `om_delta_step` moves on, of T different sequences. Returns 0, or -1 when
 * memory is short. */
OM_EXPORT int om_linear_attention_step(const om_linear_attention *attention, const float *x, const om_room *rooms, int64_t num_rows,
                                       float *out) {
    attention_job job = {.layer = attention, .rooms = rooms, .num_rows = num_rows, .out = out};
    for (int64_t i = 0; i < attention->num_inputs; i++)
        job.projections[i] = (om_linear_job){.matrices = attention->inputs + i, .records = attention->records + i,
                                             .outs = job.projected + i, .x = x, .num_matrices = 1, .num_tokens = num_rows};
    job.output = (om_linear_job){.matrices = &attention->output, .records = &attention->output_record, .outs = &job.out,
                                 .num_matrices = 1, .num_tokens = num_rows};
    return om_call_in_arena(&job, lay_out, run);
}
