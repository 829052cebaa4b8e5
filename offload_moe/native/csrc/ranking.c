/* The ranking of the default policy in one call; see `residency/policy/ranking.py`, and `tests/support/numpy_ranking.py` for the
 * same in numpy.
 * X experts of the pool, M stored tokens, D features. */
#include "job.h"

#include <math.h>

#define BLOCK 64 /* tokens, or experts, at a time; M is a multiple of it */
#define MAX_NEIGHBOURS 16

enum { CONSTANT, SLOW, FAST, USED, PREDICTED, UNPREDICTED, NUM_FEATURES };

/* Compare stored tokens with the experts that the present one used, and store these. */
static void observe(const om_ranking *r, const om_passed *passed) {
    for (int64_t first = 0; first < r->num_tokens; first += BLOCK) {
        int32_t shared[BLOCK] = {0};
        for (int64_t k = 0; k < passed->num_keys; k++) {
            const uint8_t *was_used = r->was_used + passed->keys[k] * r->num_tokens + first;
            for (int i = 0; i < BLOCK; i++) shared[i] += was_used[i];
        }
        for (int i = 0; i < BLOCK; i++) r->matched[first + i] = r->matched[first + i] * passed->decay + (float)shared[i];
    }
    for (int64_t k = 0; k < passed->num_keys; k++) r->used[passed->keys[k]] = 1;
}

/* The best match of each of the best columns, by the constants of `History`, and their weights. Returns the sum of the weights. */
static float find_nearest(const om_ranking *r, float matchable, int64_t *nearest, float *weights) {
    float best[BLOCK], trust = 0.0f;
    int32_t at[BLOCK];
    for (int c = 0; c < BLOCK; c++) {
        best[c] = r->matched[c];
        at[c] = c;
    }
    for (int32_t first = BLOCK; first < r->num_tokens; first += BLOCK)
        for (int c = 0; c < BLOCK; c++) {
            const int is_better = r->matched[first + c] > best[c];
            at[c] = is_better ? first + c : at[c];
            best[c] = is_better ? r->matched[first + c] : best[c];
        }
    for (int64_t n = 0; n < r->num_neighbours; n++) {
        int chosen = 0;
        for (int c = 1; c < BLOCK; c++)
            if (best[c] > best[chosen]) chosen = c;
        nearest[n] = at[chosen];
        weights[n] = powf(best[chosen] / matchable, r->sharpness);
        trust += weights[n];
        best[chosen] = -1.0f;
    }
    return trust;
}

/* 1 where the present token used the expert, or the share of a chunk's tokens that did. */
static void find_used(const om_passed *passed, int64_t first, int64_t count, float *used) {
    for (int64_t i = 0; i < BLOCK; i++) used[i] = 0.0f;
    for (int64_t k = 0; k < passed->num_keys; k++)
        if (passed->keys[k] >= first && passed->keys[k] < first + count) used[passed->keys[k] - first] = passed->shares[k];
}

static void learn(const om_ranking *r, float discount, float before[][BLOCK], float after[][BLOCK], const float *used, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        for (int d = 0; d < NUM_FEATURES; d++) {
            for (int e = 0; e < NUM_FEATURES; e++)
                r->covariance[d * NUM_FEATURES + e] +=
                    before[d][i] * (before[e][i] - discount * (1.0f - used[i]) * after[e][i]);
            r->evidence[d] += before[d][i] * used[i];
        }
}

static void rank_block(const om_ranking *r, const om_passed *passed, int64_t first, int64_t count, const float *predicted,
                       float trust) {
    float used[BLOCK], before[NUM_FEATURES][BLOCK], after[NUM_FEATURES][BLOCK];
    const float share = 1.0f / (trust + r->shrinkage);
    find_used(passed, first, count, used);
    for (int d = 0; d < NUM_FEATURES; d++)
        for (int64_t i = 0; i < count; i++) before[d][i] = after[d][i] = r->features[d * r->num_keys + first + i];
    for (int64_t i = 0; i < count; i++) {
        after[SLOW][i] += passed->slow_step * (used[i] - after[SLOW][i]);
        after[FAST][i] += passed->fast_step * (used[i] - after[FAST][i]);
        after[USED][i] = used[i];
        after[PREDICTED][i] = predicted[i] * share;
        after[UNPREDICTED][i] = after[SLOW][i] * r->shrinkage * share;
    }
    if (passed->learns) learn(r, passed->discount, before, after, used, count);
    for (int64_t i = 0; i < count; i++) {
        float worth = 0.0f;
        for (int d = 0; d < NUM_FEATURES; d++) worth += r->weights[d] * after[d][i];
        r->worth[first + i] = worth;
        r->order[first + i] = worth * passed->discount + r->absent[first + i];
    }
    for (int d = SLOW; d < NUM_FEATURES; d++)
        for (int64_t i = 0; i < count; i++) r->features[d * r->num_keys + first + i] = after[d][i];
}

/* Learn from layers that were passed, and rank their experts for the next token. */
static void rank_passed(const om_ranking *r, const om_passed *passed) {
    int64_t nearest[MAX_NEIGHBOURS];
    float weights[MAX_NEIGHBOURS];
    if (passed->observes) observe(r, passed);
    const float trust = find_nearest(r, passed->matchable, nearest, weights);
    for (int64_t first = passed->first; first < passed->end; first += BLOCK) {
        const int64_t count = om_min(BLOCK, passed->end - first);
        float predicted[BLOCK] = {0};
        for (int64_t n = 0; n < r->num_neighbours; n++) {
            const uint8_t *future = r->future + nearest[n] * r->num_keys + first;
            const float weight = weights[n] / 255.0f;
            for (int64_t i = 0; i < count; i++) predicted[i] += weight * (float)future[i];
        }
        rank_block(r, passed, first, count, predicted, trust);
    }
}

/* One after the other. */
OM_EXPORT void om_rank(const om_ranking *r, const om_passed *passed, int64_t count) {
    for (int64_t i = 0; i < count; i++) rank_passed(r, passed + i);
}
