/* A token in a layer of gated delta rules, behind its projections. */
#include "job.h"
#include "vector_set.h"

typedef struct {
    const om_delta *layer;
    const om_delta_inputs *projected;
    om_delta_states states;
    float *out;
} delta_job;

static void heads_unit(void *context, int64_t unit, int64_t next, int thread) {
    (void)next, (void)thread;
    const delta_job *job = context;
    om_active_isa()->vectors->delta_heads(job->layer, job->projected, unit, &job->states, job->out);
}

/* One token. inputs [channels, conv_length], of all queries, keys and values in this order, and state [H, key_dim, value_dim] are
 * moved on. out [H, value_dim]. */
OM_EXPORT void om_delta_step(const om_delta *layer, const om_delta_inputs *projected, float *inputs, float *state, float *out) {
    delta_job job = {layer, projected, {inputs, state, inputs, state}, out};
    om_pool_begin();
    om_pool_run(heads_unit, &job, layer->num_key_heads);
    om_pool_end();
}
