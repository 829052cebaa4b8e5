/* Linear attention in one call: projections, the gated delta rule, output projection.
 *
 * T rows in fp32, tokens of one sequence, one after the other, or of several: the bits of each row alone. */
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

/* The states that a row reads, and those that it leaves. */
static om_delta_states find_states(const om_delta *rule, const om_room *room) {
    const int64_t keys = rule->num_key_heads * rule->key_dim, values = rule->num_heads * rule->value_dim;
    const int64_t num_inputs = (2 * keys + values) * rule->conv_length, num_numbers = values * rule->key_dim;
    float *inputs = room->keys, *state = room->values;
    return (om_delta_states){inputs + room->capacity * num_inputs, state + room->capacity * num_numbers,
                             inputs + room->length * num_inputs, state + room->length * num_numbers};
}

static void step_heads(const attention_job *job, int64_t row, int64_t head) {
    const om_delta *rule = &job->layer->rule;
    const int64_t *strides = job->layer->strides;
    const om_delta_states states = find_states(rule, job->rooms + row);
    const om_delta_inputs inputs = {find(job, row, 0), find(job, row, 1), find(job, row, 2), find(job, row, 3), find(job, row, 4),
                                    find(job, row, 5), {strides[0], strides[1], strides[2], strides[3]}};
    om_active_isa()->vectors->delta_heads(rule, &inputs, head, &states, job->mixed + row * rule->num_heads * rule->value_dim);
}

/* A head of keys of one sequence: the unit of its first row takes all of its rows. */
static void heads_unit(void *context, int64_t unit, int64_t next, int thread) {
    (void)next, (void)thread;
    const attention_job *job = context;
    const int64_t num_heads = job->layer->rule.num_key_heads;
    const om_room *rooms = job->rooms;
    int64_t row = unit / num_heads;
    if (row > 0 && rooms[row].values == rooms[row - 1].values) return;
    do step_heads(job, row, unit % num_heads);
    while (++row < job->num_rows && rooms[row].values == rooms[row - 1].values);
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

/* x[T, hidden] -> out[T, hidden]. The rooms hold what `om_delta_step` moves on. Rows of one sequence follow each other and have
 * the same room; each reads what the one before it left. Returns 0, or -1 when memory is short. */
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
