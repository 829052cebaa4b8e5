/* A decode step of consecutive decoder layers on a thread of its own, which fetches missing experts.
 *
 * One token of one sequence, in fp32; per layer the calls of `layer.c` and `moe.c`. H hidden, E experts, K chosen.
 * An expert that it cannot fetch is a need that Python serves; the resident experts are computed meanwhile. */
#define _GNU_SOURCE
#include "deadline.h"
#include "float_mode.h"
#include "job.h"
#include "reads.h"

#include <stdlib.h>
#include <time.h>

struct om_pass {
    const om_span *span;
    const om_span_token *token;
    om_slot_table *slot_table; /* its lock guards the fields below */
    om_reads *reads;         /* NULL: every missing expert is a need */
    pthread_t thread;
    pthread_cond_t changed;
    int64_t num_routed;      /* layers whose routers have been computed */
    int64_t result;          /* how many of all layers are done, or -1 when memory was short; OM_UNDER_WAY until then */
    int is_stopped;
    uint8_t needs[];         /* [layers]: needs that om_pass_next has not returned yet */
};

/* The experts of one token in ascending order. */
typedef struct {
    int64_t keys[OM_MAX_TOP_K];
    float weights[OM_MAX_TOP_K];
    int32_t rank[OM_MAX_TOP_K]; /* among what the router chose */
    const uint8_t *records[OM_MAX_TOP_K]; /* of those that are leased; NULL until then */
    int has_need; /* of experts that could not be fetched */
} om_chosen;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void sort_chosen(const om_span *span, const om_span_token *token, int64_t at, om_chosen *chosen) {
    const om_span_layer *layer = span->layers + at;
    chosen->has_need = 0;
    for (int64_t k = 0; k < span->top_k; k++) {
        const int64_t key = layer->first_key + token->ids[at * span->top_k + k];
        int64_t place = k;
        for (; place > 0 && chosen->keys[place - 1] > key; place--) {
            chosen->keys[place] = chosen->keys[place - 1];
            chosen->weights[place] = chosen->weights[place - 1];
            chosen->rank[place] = chosen->rank[place - 1];
        }
        chosen->keys[place] = key;
        chosen->rank[place] = (int32_t)k;
        chosen->weights[place] = token->weights[at * span->top_k + k] * layer->weight_scale;
        chosen->records[k] = NULL;
    }
}

/* Evaluate the routers of the next layers ahead. Returns 0, or -1 when memory is short. */
static int guess(const om_span *span, const om_span_token *token, int64_t at) {
    float *normed = token->guess_space, *logits = normed + span->hidden, *weights = logits + span->num_experts;
    for (int64_t ahead = 0; ahead < token->num_ahead && at + 1 + ahead < span->num_layers; ahead++) {
        int64_t *ids = token->guesses + (at * token->num_ahead + ahead) * span->top_k;
        if (om_layer_guess(span->layers[at + 1 + ahead].layer, token->residual, normed, logits, weights, ids) != 0) return -1;
    }
    return 0;
}

/* Fetch the likeliest guesses if they are absent, and note how all were found (lock held). */
static void fetch_guesses(const om_pass *pass, int64_t at) {
    const om_span *span = pass->span;
    const om_span_token *token = pass->token;
    for (int64_t ahead = 0; ahead < token->num_ahead && at + 1 + ahead < span->num_layers; ahead++) {
        const int64_t first = (at * token->num_ahead + ahead) * span->top_k;
        for (int64_t k = 0; k < span->top_k; k++) {
            const int64_t key = span->layers[at + 1 + ahead].first_key + token->guesses[first + k];
            uint8_t *found = token->guesses_found + first + k;
            if (pass->slot_table->records[key] != NULL) *found = OM_HIT;
            else *found = k < token->ranks[ahead] && pass->reads != NULL && om_reads_fetch(pass->reads, key, 1) ? OM_FETCHED : OM_MISSING;
        }
    }
}

/* Fetch the absent ones of a layer's experts (lock held). Returns whether all could be fetched. */
static int fetch_chosen(const om_pass *pass, int64_t at, const om_chosen *chosen) {
    uint8_t *found = pass->token->found + at * pass->span->top_k;
    int is_well = 1;
    for (int64_t k = 0; k < pass->span->top_k; k++) {
        const int64_t key = chosen->keys[k];
        uint8_t *mine = found + chosen->rank[k];
        *mine = chosen->records[k] != NULL ? OM_HIT : pass->slot_table->records[key] == OM_COMING ? OM_ARRIVING : OM_MISSING;
        if (*mine == OM_ARRIVING && pass->reads != NULL) om_reads_promote(pass->reads, key);
        if (*mine == OM_MISSING) is_well &= pass->reads != NULL && om_reads_fetch(pass->reads, key, 0);
    }
    return is_well;
}

static void need(om_pass *pass, int64_t at, int what) {
    pass->needs[at] |= (uint8_t)what;
    pthread_cond_signal(&pass->changed);
}

static void need_experts(om_pass *pass, int64_t at, om_chosen *chosen) {
    if (!chosen->has_need) need(pass, at, OM_NEEDS_EXPERTS);
    chosen->has_need = 1;
}

/* Lease experts that are resident and not leased yet (lock held). Returns their number; places: their places in `chosen`. */
static int64_t lease_resident(const om_pass *pass, om_chosen *chosen, int32_t *places) {
    int64_t num_leased = 0;
    for (int32_t k = 0; k < pass->span->top_k; k++)
        if (chosen->records[k] == NULL && om_is_resident(pass->slot_table, chosen->keys[k])) {
            pass->slot_table->leases[chosen->keys[k]]++;
            chosen->records[k] = pass->slot_table->records[chosen->keys[k]];
            places[num_leased++] = k;
        }
    return num_leased;
}

static void release(const om_pass *pass, const om_chosen *chosen) {
    pthread_mutex_lock(&pass->slot_table->lock);
    for (int64_t k = 0; k < pass->span->top_k; k++)
        if (chosen->records[k] != NULL) pass->slot_table->leases[chosen->keys[k]]--;
    pthread_mutex_unlock(&pass->slot_table->lock);
}

/* Lease and fetch the experts that the router has chosen. Returns the number of resident ones. */
static int64_t begin_layer(om_pass *pass, int64_t at, om_chosen *chosen, int32_t *places) {
    const int64_t end = pass->span->layers[at].first_key + pass->span->num_experts;
    pthread_mutex_lock(&pass->slot_table->lock);
    const int64_t num_leased = lease_resident(pass, chosen, places);
    if (pass->reads != NULL) om_reads_drop_wrong(pass->reads, end, chosen->keys, pass->span->top_k);
    const int is_well = fetch_chosen(pass, at, chosen);
    fetch_guesses(pass, at);
    pass->num_routed = at + 1;
    if (!is_well) need_experts(pass, at, chosen);
    if (pass->reads != NULL && om_reads_are_short(pass->reads)) need(pass, at, OM_NEEDS_SLOTS);
    pthread_mutex_unlock(&pass->slot_table->lock);
    return num_leased;
}

/* Whether an expert of the layer is neither resident nor on its way any more: its read has failed (lock held). */
static int has_lost(const om_pass *pass, const om_chosen *chosen) {
    for (int64_t k = 0; k < pass->span->top_k; k++)
        if (chosen->records[k] == NULL && pass->slot_table->records[chosen->keys[k]] == NULL) return 1;
    return 0;
}

/* Wait until more experts of the layer are resident. Returns their number; 0: the token pass is stopped. */
static int64_t wait_for_more(om_pass *pass, int64_t at, om_chosen *chosen, int32_t *places) {
    const double began = seconds();
    int64_t num_leased = 0;
    pthread_mutex_lock(&pass->slot_table->lock);
    while (!pass->is_stopped && (num_leased = lease_resident(pass, chosen, places)) == 0) {
        if (has_lost(pass, chosen)) need_experts(pass, at, chosen);
        pthread_cond_wait(&pass->slot_table->arrived, &pass->slot_table->lock);
    }
    pthread_mutex_unlock(&pass->slot_table->lock);
    pass->token->stalls[at] += seconds() - began;
    return num_leased;
}

/* out[H] = the weighted sum of these experts; with `rows`, each sets its row instead: the same bits once they are summed. */
static int compute(const om_pass *pass, int64_t at, const om_chosen *chosen, const int32_t *places, int64_t num_experts,
                   float *rows) {
    static const int32_t token_ids[OM_MAX_TOP_K] = {0};
    const om_span_layer *layer = pass->span->layers + at;
    const uint8_t *records[OM_MAX_TOP_K];
    float weights[OM_MAX_TOP_K];
    int32_t offsets[OM_MAX_TOP_K + 1] = {0};
    for (int64_t n = 0; n < num_experts; n++) {
        records[n] = chosen->records[places[n]];
        weights[n] = chosen->weights[places[n]];
        offsets[n + 1] = (int32_t)n + 1;
    }
    return om_moe_forward(layer->experts, pass->token->normed, 1, OM_F32, records, offsets, token_ids, rows == NULL ? NULL : places,
                          weights, num_experts, rows == NULL ? pass->token->x : rows, OM_F32, 0);
}

/* x = the experts of the layer, the resident ones first. Returns 0, -1 when memory is short, 1 when the token pass is stopped. */
static int run_experts(om_pass *pass, int64_t at, om_chosen *chosen) {
    const om_span *span = pass->span;
    int32_t places[OM_MAX_TOP_K];
    int64_t num_leased = begin_layer(pass, at, chosen, places), num_done = 0;
    if (num_leased == span->top_k) return compute(pass, at, chosen, places, num_leased, NULL);
    float *rows = pass->token->rows;
    for (;;) {
        if (num_leased > 0 && compute(pass, at, chosen, places, num_leased, rows) != 0) return -1;
        num_done += num_leased;
        if (num_done == span->top_k) break;
        num_leased = wait_for_more(pass, at, chosen, places);
        if (num_leased == 0) return 1;
    }
    om_sum_rows(rows, span->top_k, span->hidden, pass->token->x, OM_F32);
    return 0;
}

static int step_layer(om_pass *pass, int64_t at, double began) {
    const om_span *span = pass->span;
    const om_span_token *token = pass->token;
    const om_span_layer *layer = span->layers + at;
    om_chosen chosen;
    if (om_layer_step(layer->layer, token->x, token->cos, token->signed_sin, token->keys[at], token->values[at],
                      token->capacities[at], token->lengths[at], token->residual, token->normed,
                      token->logits + at * span->num_experts, token->weights + at * span->top_k, token->ids + at * span->top_k) != 0 ||
        guess(span, token, at) != 0)
        return -1;
    sort_chosen(span, token, at, &chosen);
    token->times[2 * at] = seconds() - began;
    const int status = run_experts(pass, at, &chosen);
    release(pass, &chosen);
    if (status != 0) return status;
    if (layer->shared != NULL && om_add_shared(layer->shared, token->normed, token->x) != 0) return -1;
    for (int64_t i = 0; i < span->hidden; i++)
        token->x[i] = token->residual[i] + layer->layer->residual_scale * token->x[i];
    token->times[2 * at + 1] = seconds() - began;
    return 0;
}

static om_pass *new_pass(const om_span *span, const om_span_token *token, om_slot_table *slot_table, om_reads *reads) {
    om_pass *pass = calloc(1, sizeof *pass + (size_t)span->num_layers);
    if (pass == NULL) return NULL;
    pass->span = span;
    pass->token = token;
    pass->slot_table = slot_table;
    pass->reads = reads;
    pass->result = OM_UNDER_WAY;
    om_init_condition(&pass->changed);
    om_slot_table_use(slot_table);
    if (reads != NULL) om_reads_use(reads);
    return pass;
}

static void delete_pass(om_pass *pass) {
    if (pass->reads != NULL) om_reads_leave(pass->reads);
    om_slot_table_close(pass->slot_table);
    pthread_cond_destroy(&pass->changed);
    free(pass);
}

static void *pass_through_layers(void *argument) {
    om_pass *pass = argument;
    const double began = seconds();
    const uint64_t callers_mode = om_enter_float_mode();
    int64_t at = 0;
    int status = 0;
    while (at < pass->span->num_layers && (status = step_layer(pass, at, began)) == 0) at++;
    pthread_mutex_lock(&pass->slot_table->lock);
    pass->result = status < 0 ? -1 : at;
    pthread_cond_signal(&pass->changed);
    pthread_mutex_unlock(&pass->slot_table->lock);
    om_restore_float_mode(callers_mode);
    return NULL;
}

/* Take x through all layers, whose experts must all be resident. Returns the number of layers, or -1 when memory is short. */
OM_EXPORT int64_t om_span_pass(const om_span *span, const om_span_token *token, om_slot_table *slot_table) {
    om_pass *pass = new_pass(span, token, slot_table, NULL);
    if (pass == NULL) return -1;
    pass_through_layers(pass);
    const int64_t result = pass->result;
    delete_pass(pass);
    return result;
}

/* Take x through all layers on another thread. reads: may be NULL. NULL when the thread cannot be made. */
OM_EXPORT om_pass *om_pass_start(const om_span *span, const om_span_token *token, om_slot_table *slot_table, om_reads *reads) {
    om_pass *pass = new_pass(span, token, slot_table, reads);
    if (pass == NULL) return NULL;
    if (pthread_create(&pass->thread, NULL, pass_through_layers, pass) == 0) {
        om_pool_place_caller(pass->thread);
        return pass;
    }
    delete_pass(pass);
    return NULL;
}

/* Wait, `limit_s` seconds at most, for the first layer from `first` on with a need. Returns the layer and the need, once; the
 * number of layers when all are done; -1 when memory was short; -2 when the limit has passed. */
OM_EXPORT int64_t om_pass_next(om_pass *pass, int64_t first, double limit_s, int32_t *needs) {
    const struct timespec deadline = om_deadline(limit_s);
    int64_t at = first;
    int has_time = 1;
    pthread_mutex_lock(&pass->slot_table->lock);
    for (;;) {
        while (at < pass->num_routed && !pass->needs[at]) at++;
        if (at < pass->num_routed || pass->result != OM_UNDER_WAY || !has_time) break;
        has_time = pthread_cond_timedwait(&pass->changed, &pass->slot_table->lock, &deadline) == 0;
    }
    *needs = 0;
    if (at >= pass->num_routed) {
        at = pass->result;
    } else {
        *needs = pass->needs[at];
        pass->needs[at] = 0;
    }
    pthread_mutex_unlock(&pass->slot_table->lock);
    return at;
}

/* Stop the token pass where it waits for an expert, unless it has ended, and free it. */
OM_EXPORT void om_pass_end(om_pass *pass) {
    pthread_mutex_lock(&pass->slot_table->lock);
    pass->is_stopped = 1;
    pthread_cond_broadcast(&pass->slot_table->arrived);
    pthread_mutex_unlock(&pass->slot_table->lock);
    pthread_join(pass->thread, NULL);
    delete_pass(pass);
}
