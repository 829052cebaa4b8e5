/* The router of one token in one call: logits, softmax and top-k, in fp32. E experts, K chosen. */
#include "job.h"

#include <math.h>

/* The greatest first; of equal ones the lower expert. */
static void choose(const float *logits, int64_t num_experts, int64_t top_k, int64_t *ids) {
    for (int64_t k = 0; k < top_k; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < num_experts; e++) {
            int is_taken = 0;
            if (best >= 0 && !(logits[e] > logits[best])) continue;
            for (int64_t i = 0; i < k; i++) is_taken |= ids[i] == e;
            if (!is_taken) best = e;
        }
        ids[k] = best;
    }
}

static void weigh(const om_router *router, const float *logits, const int64_t *ids, float *weights) {
    const float greatest = logits[ids[0]];
    float all = 0.0f, chosen = 0.0f;
    for (int64_t k = 0; k < router->top_k; k++) chosen += weights[k] = expf(logits[ids[k]] - greatest);
    if (!router->is_of_chosen)
        for (int64_t e = 0; e < router->matrix.rows; e++) all += expf(logits[e] - greatest);
    for (int64_t k = 0; k < router->top_k; k++) weights[k] /= router->is_of_chosen ? chosen : all;
}

/* x[H] -> logits[E], ids[K] from the most to the least likely, their weights[K]. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_router_step(const om_router *router, const float *x, float *logits, float *weights, int64_t *ids) {
    void *out = logits;
    om_linear_job job = {.matrices = &router->matrix, .records = &router->record, .outs = &out, .x = x, .num_matrices = 1,
                         .num_tokens = 1, .mode = OM_EXACT};
    if (om_call_linear(&job) != 0) return -1;
    if (router->bias != NULL)
        for (int64_t e = 0; e < router->matrix.rows; e++) logits[e] += router->bias[e];
    choose(logits, router->matrix.rows, router->top_k, ids);
    weigh(router, logits, ids, weights);
    return 0;
}
