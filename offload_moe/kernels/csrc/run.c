/* A decode step of consecutive decoder layers in one call, for as long as their experts are resident.
 *
 * One token of one sequence, in fp32; per layer the calls of `layer.c` and `moe.c`. H hidden, E experts, K chosen. */
#include "job.h"

#include <time.h>

#define MAX_TOP_K 64

typedef struct {
    const om_layer *layer; /* with a router */
    const om_moe_layer *experts;
    const om_shared *shared; /* NULL where there is none */
    int64_t first_key; /* of the layer's experts in `slots` */
    float weight_scale;
    int32_t mode;
} om_run_layer;

typedef struct {
    const om_run_layer *layers;
    int64_t num_layers, hidden, num_experts, top_k;
} om_run;

typedef struct {
    const float *cos, *signed_sin;
    float *const *keys, *const *values; /* per layer, as `om_attention_step` has them */
    const int64_t *capacities, *lengths;
    float *x, *residual, *normed;       /* [H] */
    float *logits, *weights;            /* [layers, E], [layers, K] */
    int64_t *ids;                       /* [layers, K] */
    double *times;      /* [layers, 2]: seconds since the call when the experts of a layer began and when they ended */
    int64_t num_ahead;  /* layers behind each one whose routers are asked ahead */
    const int64_t *ranks; /* [num_ahead]: how many of the likeliest of what they say count */
    int64_t *guesses;   /* [layers, num_ahead, K]: what they say */
    float *guess_space; /* [H + E + K] */
} om_run_token;

static double seconds(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

typedef struct {
    const int32_t *slots;          /* by key: the slot where the expert is resident, -1 where it is absent, else on its way */
    const uint8_t *const *records; /* by slot */
} om_residents;

/* The experts of one token in ascending order. Returns whether all are resident. */
static int gather(const om_run *run, const om_run_token *token, int64_t at, const om_residents *residents,
                  const uint8_t **records, float *weights) {
    const om_run_layer *layer = run->layers + at;
    const int64_t *ids = token->ids + at * run->top_k;
    int64_t sorted[MAX_TOP_K];
    for (int64_t k = 0; k < run->top_k; k++) {
        const int32_t slot = residents->slots[layer->first_key + ids[k]];
        if (slot < 0) return 0;
        int64_t place = k;
        for (; place > 0 && sorted[place - 1] > ids[k]; place--) {
            sorted[place] = sorted[place - 1];
            records[place] = records[place - 1];
            weights[place] = weights[place - 1];
        }
        sorted[place] = ids[k];
        records[place] = residents->records[slot];
        weights[place] = token->weights[at * run->top_k + k] * layer->weight_scale;
    }
    return 1;
}

/* Ask the routers of the layers behind. Returns whether all that they name is resident or on its way; -1 without memory. */
static int guess(const om_run *run, const om_run_token *token, int64_t at, const om_residents *residents) {
    float *normed = token->guess_space, *logits = normed + run->hidden, *weights = logits + run->num_experts;
    int are_known = 1;
    for (int64_t ahead = 0; ahead < token->num_ahead && at + 1 + ahead < run->num_layers; ahead++) {
        const om_run_layer *layer = run->layers + at + 1 + ahead;
        int64_t *ids = token->guesses + (at * token->num_ahead + ahead) * run->top_k;
        if (om_layer_guess(layer->layer, token->residual, normed, logits, weights, ids) != 0) return -1;
        for (int64_t k = 0; k < token->ranks[ahead]; k++) are_known &= residents->slots[layer->first_key + ids[k]] != -1;
    }
    return are_known;
}

static int run_experts(const om_run *run, const om_run_token *token, int64_t at, const uint8_t *const *records,
                       const float *weights) {
    static const int32_t token_ids[MAX_TOP_K] = {0};
    const om_run_layer *layer = run->layers + at;
    int32_t offsets[MAX_TOP_K + 1];
    for (int64_t k = 0; k <= run->top_k; k++) offsets[k] = (int32_t)k;
    return om_moe_forward(layer->experts, token->normed, 1, OM_F32, records, offsets, token_ids, NULL, weights, run->top_k,
                          token->x, OM_F32, 0, layer->mode);
}

/* x goes through the layers from `first` on. Returns how many of all are done; one that is not done lacks its experts only,
 * because one of them is not resident or one that was guessed is absent: the caller sets x to residual + experts(normed) (+ shared)
 * and goes on behind it. Or -1 when memory is short. */
OM_EXPORT int64_t om_run_step(const om_run *run, const om_run_token *token, const om_residents *residents, int64_t first) {
    const double began = seconds();
    for (int64_t at = first; at < run->num_layers; at++) {
        const uint8_t *records[MAX_TOP_K];
        float weights[MAX_TOP_K];
        if (om_layer_step(run->layers[at].layer, token->x, token->cos, token->signed_sin, token->keys[at], token->values[at],
                          token->capacities[at], token->lengths[at], token->residual, token->normed,
                          token->logits + at * run->num_experts, token->weights + at * run->top_k,
                          token->ids + at * run->top_k) != 0)
            return -1;
        const int are_known = guess(run, token, at, residents);
        if (are_known < 0) return -1;
        if (!gather(run, token, at, residents, records, weights) || !are_known) return at;
        token->times[2 * at] = seconds() - began;
        if (run_experts(run, token, at, records, weights) != 0) return -1;
        if (run->layers[at].shared != NULL && om_add_shared(run->layers[at].shared, token->normed, token->x) != 0) return -1;
        for (int64_t i = 0; i < run->hidden; i++) token->x[i] += token->residual[i];
        token->times[2 * at + 1] = seconds() - began;
    }
    return run->num_layers;
}
