/* The router of some tokens in one call: logits, scores, the greatest K of E experts and their weights, in fp32. */
#include "job.h"
#include "vector_set.h"

#include <math.h>

/* The order of choice: the greatest first; of equal ones the lower expert. */
static void choose(const float *scores, int64_t num_experts, int64_t top_k, int64_t *ids) {
    for (int64_t k = 0; k < top_k; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < num_experts; e++) {
            int is_taken = 0;
            if (best >= 0 && !(scores[e] > scores[best])) continue;
            for (int64_t i = 0; i < k; i++) is_taken |= ids[i] == e;
            if (!is_taken) best = e;
        }
        ids[k] = best;
    }
}

/* values[count] -> their softmax. */
static void soften(float *values, int64_t count) {
    const float share = 1.0f / om_active_isa()->vectors->exponentials(values, count);
    for (int64_t i = 0; i < count; i++) values[i] *= share;
}

/* The scores[E] of all experts. */
static void score(const om_router *router, const float *logits, float *scores) {
    __builtin_memcpy(scores, logits, (size_t)router->matrix.rows * sizeof(float));
    if (router->is_sigmoid)
        om_active_isa()->vectors->sigmoids(scores, router->matrix.rows);
    else
        soften(scores, router->matrix.rows);
}

/* Shares among the chosen are a softmax of theirs: the factor that all of them have in common cancels. */
static void weigh_shares(const om_router *router, const float *logits, const int64_t *ids, float *weights) {
    float scores[OM_MAX_SCORED];
    if (!router->is_of_chosen) score(router, logits, scores);
    for (int64_t k = 0; k < router->top_k; k++) weights[k] = (router->is_of_chosen ? logits : scores)[ids[k]];
    if (router->is_of_chosen) soften(weights, router->top_k);
}

static void weigh_sigmoids(const om_router *router, const float *logits, const int64_t *ids, float *weights) {
    float chosen = 0.0f;
    for (int64_t k = 0; k < router->top_k; k++) weights[k] = logits[ids[k]];
    om_active_isa()->vectors->sigmoids(weights, router->top_k);
    for (int64_t k = 0; k < router->top_k; k++) chosen += weights[k];
    if (router->is_of_chosen)
        for (int64_t k = 0; k < router->top_k; k++) weights[k] /= chosen + 1e-20f;
}

/* Those of left[E] whose logits are near that of `chosen`, which is the greatest of them; the others -infinity. */
static void keep_near(const om_router *router, const float *left, int64_t chosen, float *near) {
    for (int64_t e = 0; e < router->matrix.rows; e++) {
        const float size = fabsf(left[e]), divisor = size > left[chosen] ? size : left[chosen];
        near[e] = (left[chosen] - left[e]) / divisor > 2.0f * router->jitter ? -INFINITY : left[e];
    }
}

/* A sparse mixer (arXiv:2409.12136): each expert's share among those near it that are left when it is chosen. */
static void weigh_mixed(const om_router *router, const float *logits, const int64_t *ids, float *weights) {
    float left[OM_MAX_SCORED], near[OM_MAX_SCORED];
    __builtin_memcpy(left, logits, (size_t)router->matrix.rows * sizeof(float));
    for (int64_t k = 0; k < router->top_k; k++) {
        keep_near(router, left, ids[k], near);
        soften(near, router->matrix.rows);
        weights[k] = near[ids[k]];
        left[ids[k]] = -INFINITY;
    }
}

/* The greatest score of a group, or the sum of its two greatest. */
static float score_of_group(const om_router *router, const float *scores, int64_t size) {
    float best = -INFINITY, second = -INFINITY;
    for (int64_t e = 0; e < size; e++) {
        if (scores[e] > best) {
            second = best;
            best = scores[e];
        } else if (scores[e] > second) {
            second = scores[e];
        }
    }
    return router->num_best == 1 || size == 1 ? best : best + second;
}

/* Experts outside of the best groups cannot be chosen. */
static void exclude_groups(const om_router *router, float *scores) {
    float of_groups[OM_MAX_SCORED];
    int64_t chosen[OM_MAX_SCORED];
    const int64_t size = router->matrix.rows / router->num_groups;
    for (int64_t g = 0; g < router->num_groups; g++) of_groups[g] = score_of_group(router, scores + g * size, size);
    choose(of_groups, router->num_groups, router->num_chosen_groups, chosen);
    for (int64_t g = 0; g < router->num_groups; g++) {
        int is_chosen = 0;
        for (int64_t i = 0; i < router->num_chosen_groups; i++) is_chosen |= chosen[i] == g;
        for (int64_t e = g * size; !is_chosen && e < (g + 1) * size; e++) scores[e] = -INFINITY;
    }
}

static void choose_experts(const om_router *router, const float *logits, int64_t *ids) {
    float scores[OM_MAX_SCORED];
    const int has_groups = router->num_chosen_groups < router->num_groups;
    if (router->correction == NULL && !has_groups) {
        choose(logits, router->matrix.rows, router->top_k, ids); /* scores grow with them */
        return;
    }
    score(router, logits, scores);
    if (router->correction != NULL)
        for (int64_t e = 0; e < router->matrix.rows; e++) scores[e] += router->correction[e];
    if (has_groups) exclude_groups(router, scores);
    choose(scores, router->matrix.rows, router->top_k, ids);
}

OM_APART static void route(const om_router *router, float *logits, float *weights, int64_t *ids) {
    om_add_bias(logits, router->bias, router->matrix.rows);
    choose_experts(router, logits, ids);
    (router->is_mixer ? weigh_mixed : router->is_sigmoid ? weigh_sigmoids : weigh_shares)(router, logits, ids, weights);
    for (int64_t k = 0; k < router->top_k; k++) weights[k] *= router->scale;
}

typedef struct {
    const om_router *router;
    float *logits, *weights;
    int64_t *ids;
} route_job;

static void route_unit(void *context, int64_t row, int64_t next, int thread) {
    (void)next, (void)thread;
    const route_job *job = context;
    const int64_t top_k = job->router->top_k;
    route(job->router, job->logits + row * job->router->matrix.rows, job->weights + row * top_k, job->ids + row * top_k);
}

/* x[T, H] -> logits[T, E], ids[T, K] from the most to the least likely, their weights[T, K]. Returns 0, or -1 when memory is
 * short. */
OM_EXPORT int om_router_step(const om_router *router, const float *x, int64_t num_rows, float *logits, float *weights,
                             int64_t *ids) {
    void *out = logits;
    om_linear_job job = {.matrices = &router->matrix, .records = &router->record, .outs = &out, .x = x, .num_matrices = 1,
                         .num_tokens = num_rows};
    if (om_call_linear(&job) != 0) return -1;
    route_job routes = {router, logits, weights, ids};
    om_pool_begin();
    om_run_rows(route_unit, &routes, num_rows);
    om_pool_end();
    return 0;
}
