/* A decode step of consecutive decoder layers on a thread of its own, which fetches the experts that it lacks.
 *
 * One token of one sequence, in fp32; per layer the calls of `layer.c` and `moe.c`. H hidden, E experts, K chosen.
 * Where it cannot fetch by itself it asks, and goes on with what it has meanwhile. */
#define _GNU_SOURCE
#include "deadline.h"
#include "job.h"
#include "reads.h"

#include <stdlib.h>
#include <time.h>

struct om_pass {
    const om_span *run;
    const om_span_token *token;
    om_slot_table *slot_table; /* its lock guards what follows */
    om_reads *reads;         /* NULL: it asks for everything */
    pthread_t thread;
    pthread_cond_t told;
    int64_t num_routed;      /* layers whose routers have spoken */
    int64_t result;          /* how many of all layers are done, or -1 when memory was short; OM_UNDER_WAY until then */
    int is_stopped;
    uint8_t needs[];         /* [layers]: what is still to be told of them */
};

/* The experts of one token in ascending order. */
typedef struct {
    int64_t keys[OM_MAX_TOP_K];
    float weights[OM_MAX_TOP_K];
    int32_t rank[OM_MAX_TOP_K]; /* among what the router chose */
    const uint8_t *records[OM_MAX_TOP_K]; /* of those that are leased; NULL until then */
    int has_asked; /* the other side for what could not be fetched */
} om_chosen;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void sort_chosen(const om_span *run, const om_span_token *token, int64_t at, om_chosen *chosen) {
    const om_span_layer *layer = run->layers + at;
    chosen->has_asked = 0;
    for (int64_t k = 0; k < run->top_k; k++) {
        const int64_t key = layer->first_key + token->ids[at * run->top_k + k];
        int64_t place = k;
        for (; place > 0 && chosen->keys[place - 1] > key; place--) {
            chosen->keys[place] = chosen->keys[place - 1];
            chosen->weights[place] = chosen->weights[place - 1];
            chosen->rank[place] = chosen->rank[place - 1];
        }
        chosen->keys[place] = key;
        chosen->rank[place] = (int32_t)k;
        chosen->weights[place] = token->weights[at * run->top_k + k] * layer->weight_scale;
        chosen->records[k] = NULL;
    }
}

/* Ask the routers of the layers behind. Returns 0, or -1 when memory is short. */
static int guess(const om_span *run, const om_span_token *token, int64_t at) {
    float *normed = token->guess_space, *logits = normed + run->hidden, *weights = logits + run->num_experts;
    for (int64_t ahead = 0; ahead < token->num_ahead && at + 1 + ahead < run->num_layers; ahead++) {
        int64_t *ids = token->guesses + (at * token->num_ahead + ahead) * run->top_k;
        if (om_layer_guess(run->layers[at + 1 + ahead].layer, token->residual, normed, logits, weights, ids) != 0) return -1;
    }
    return 0;
}

/* Fetch those guesses that count and are absent, and note what was there (lock held). */
static void fetch_guesses(const om_pass *ride, int64_t at) {
    const om_span *run = ride->run;
    const om_span_token *token = ride->token;
    for (int64_t ahead = 0; ahead < token->num_ahead && at + 1 + ahead < run->num_layers; ahead++) {
        const int64_t first = (at * token->num_ahead + ahead) * run->top_k;
        for (int64_t k = 0; k < run->top_k; k++) {
            const int64_t key = run->layers[at + 1 + ahead].first_key + token->guesses[first + k];
            uint8_t *found = token->guesses_found + first + k;
            if (ride->slot_table->records[key] != NULL) *found = OM_HIT;
            else *found = k < token->ranks[ahead] && ride->reads != NULL && om_reads_fetch(ride->reads, key, 1) ? OM_FETCHED : OM_MISSING;
        }
    }
}

/* Fetch what a layer chose and lacks (lock held). Returns whether that went well. */
static int fetch_chosen(const om_pass *ride, int64_t at, const om_chosen *chosen) {
    uint8_t *found = ride->token->found + at * ride->run->top_k;
    int is_well = 1;
    for (int64_t k = 0; k < ride->run->top_k; k++) {
        const int64_t key = chosen->keys[k];
        uint8_t *mine = found + chosen->rank[k];
        *mine = chosen->records[k] != NULL ? OM_HIT : ride->slot_table->records[key] == OM_COMING ? OM_ARRIVING : OM_MISSING;
        if (*mine == OM_ARRIVING && ride->reads != NULL) om_reads_promote(ride->reads, key);
        if (*mine == OM_MISSING) is_well &= ride->reads != NULL && om_reads_fetch(ride->reads, key, 0);
    }
    return is_well;
}

static void need(om_pass *ride, int64_t at, int what) {
    ride->needs[at] |= (uint8_t)what;
    pthread_cond_signal(&ride->told);
}

static void ask_for_experts(om_pass *ride, int64_t at, om_chosen *chosen) {
    if (!chosen->has_asked) need(ride, at, OM_NEEDS_EXPERTS);
    chosen->has_asked = 1;
}

/* Lease what is resident and not leased yet (lock held). Returns how many those are; places: which of the chosen. */
static int64_t lease_resident(const om_pass *ride, om_chosen *chosen, int32_t *places) {
    int64_t num_leased = 0;
    for (int32_t k = 0; k < ride->run->top_k; k++)
        if (chosen->records[k] == NULL && om_is_resident(ride->slot_table, chosen->keys[k])) {
            ride->slot_table->leases[chosen->keys[k]]++;
            chosen->records[k] = ride->slot_table->records[chosen->keys[k]];
            places[num_leased++] = k;
        }
    return num_leased;
}

static void release(const om_pass *ride, const om_chosen *chosen) {
    pthread_mutex_lock(&ride->slot_table->lock);
    for (int64_t k = 0; k < ride->run->top_k; k++)
        if (chosen->records[k] != NULL) ride->slot_table->leases[chosen->keys[k]]--;
    pthread_mutex_unlock(&ride->slot_table->lock);
}

/* A router has spoken. Returns how many of the experts are there. */
static int64_t begin_layer(om_pass *ride, int64_t at, om_chosen *chosen, int32_t *places) {
    const int64_t end = ride->run->layers[at].first_key + ride->run->num_experts;
    pthread_mutex_lock(&ride->slot_table->lock);
    const int64_t num_leased = lease_resident(ride, chosen, places);
    if (ride->reads != NULL) om_reads_drop_wrong(ride->reads, end, chosen->keys, ride->run->top_k);
    const int is_well = fetch_chosen(ride, at, chosen);
    fetch_guesses(ride, at);
    ride->num_routed = at + 1;
    if (!is_well) ask_for_experts(ride, at, chosen);
    if (ride->reads != NULL && om_reads_are_short(ride->reads)) need(ride, at, OM_NEEDS_SLOTS);
    pthread_mutex_unlock(&ride->slot_table->lock);
    return num_leased;
}

/* Whether something of the layer is neither here nor on its way any more: a read has failed (lock held). */
static int has_lost(const om_pass *ride, const om_chosen *chosen) {
    for (int64_t k = 0; k < ride->run->top_k; k++)
        if (chosen->records[k] == NULL && ride->slot_table->records[chosen->keys[k]] == NULL) return 1;
    return 0;
}

/* Wait until something more of the layer is resident. Returns how many those are; 0: the token pass is stopped. */
static int64_t wait_for_more(om_pass *ride, int64_t at, om_chosen *chosen, int32_t *places) {
    const double began = seconds();
    int64_t num_leased = 0;
    pthread_mutex_lock(&ride->slot_table->lock);
    while (!ride->is_stopped && (num_leased = lease_resident(ride, chosen, places)) == 0) {
        if (has_lost(ride, chosen)) ask_for_experts(ride, at, chosen);
        pthread_cond_wait(&ride->slot_table->arrived, &ride->slot_table->lock);
    }
    pthread_mutex_unlock(&ride->slot_table->lock);
    ride->token->stalls[at] += seconds() - began;
    return num_leased;
}

/* out[H] = their weighted sum; with `rows`, each sets its row instead. The same bits once the rows are summed. */
static int compute(const om_pass *ride, int64_t at, const om_chosen *chosen, const int32_t *places, int64_t num_experts,
                   float *rows) {
    static const int32_t token_ids[OM_MAX_TOP_K] = {0};
    const om_span_layer *layer = ride->run->layers + at;
    const uint8_t *records[OM_MAX_TOP_K];
    float weights[OM_MAX_TOP_K];
    int32_t offsets[OM_MAX_TOP_K + 1] = {0};
    for (int64_t n = 0; n < num_experts; n++) {
        records[n] = chosen->records[places[n]];
        weights[n] = chosen->weights[places[n]];
        offsets[n + 1] = (int32_t)n + 1;
    }
    return om_moe_forward(layer->experts, ride->token->normed, 1, OM_F32, records, offsets, token_ids, rows == NULL ? NULL : places,
                          weights, num_experts, rows == NULL ? ride->token->x : rows, OM_F32, 0, layer->mode);
}

/* x = the experts of the layer, those that are there first. Returns 0, -1 when memory is short, 1 when the token pass is stopped. */
static int run_experts(om_pass *ride, int64_t at, om_chosen *chosen) {
    const om_span *run = ride->run;
    int32_t places[OM_MAX_TOP_K];
    int64_t num_leased = begin_layer(ride, at, chosen, places), num_done = 0;
    if (num_leased == run->top_k) return compute(ride, at, chosen, places, num_leased, NULL);
    float *rows = ride->token->rows;
    for (;;) {
        if (num_leased > 0 && compute(ride, at, chosen, places, num_leased, rows) != 0) return -1;
        num_done += num_leased;
        if (num_done == run->top_k) break;
        num_leased = wait_for_more(ride, at, chosen, places);
        if (num_leased == 0) return 1;
    }
    om_sum_rows(rows, run->top_k, run->hidden, ride->token->x, OM_F32);
    return 0;
}

static int step_layer(om_pass *ride, int64_t at, double began) {
    const om_span *run = ride->run;
    const om_span_token *token = ride->token;
    const om_span_layer *layer = run->layers + at;
    om_chosen chosen;
    if (om_layer_step(layer->layer, token->x, token->cos, token->signed_sin, token->keys[at], token->values[at],
                      token->capacities[at], token->lengths[at], token->residual, token->normed,
                      token->logits + at * run->num_experts, token->weights + at * run->top_k, token->ids + at * run->top_k) != 0 ||
        guess(run, token, at) != 0)
        return -1;
    sort_chosen(run, token, at, &chosen);
    token->times[2 * at] = seconds() - began;
    const int status = run_experts(ride, at, &chosen);
    release(ride, &chosen);
    if (status != 0) return status;
    if (layer->shared != NULL && om_add_shared(layer->shared, token->normed, token->x) != 0) return -1;
    for (int64_t i = 0; i < run->hidden; i++) token->x[i] += token->residual[i];
    token->times[2 * at + 1] = seconds() - began;
    return 0;
}

static om_pass *new_pass(const om_span *run, const om_span_token *token, om_slot_table *slot_table, om_reads *reads) {
    om_pass *ride = calloc(1, sizeof *ride + (size_t)run->num_layers);
    if (ride == NULL) return NULL;
    ride->run = run;
    ride->token = token;
    ride->slot_table = slot_table;
    ride->reads = reads;
    ride->result = OM_UNDER_WAY;
    om_init_condition(&ride->told);
    om_slot_table_use(slot_table);
    if (reads != NULL) om_reads_use(reads);
    return ride;
}

static void delete_pass(om_pass *ride) {
    if (ride->reads != NULL) om_reads_leave(ride->reads);
    om_slot_table_close(ride->slot_table);
    pthread_cond_destroy(&ride->told);
    free(ride);
}

static void *pass_through_layers(void *argument) {
    om_pass *ride = argument;
    const double began = seconds();
    int64_t at = 0;
    int status = 0;
    while (at < ride->run->num_layers && (status = step_layer(ride, at, began)) == 0) at++;
    pthread_mutex_lock(&ride->slot_table->lock);
    ride->result = status < 0 ? -1 : at;
    pthread_cond_signal(&ride->told);
    pthread_mutex_unlock(&ride->slot_table->lock);
    return NULL;
}

/* x goes through all layers; nothing may be missing. Returns the number of layers, or -1 when memory is short. */
OM_EXPORT int64_t om_span_pass(const om_span *run, const om_span_token *token, om_slot_table *slot_table) {
    om_pass *ride = new_pass(run, token, slot_table, NULL);
    if (ride == NULL) return -1;
    pass_through_layers(ride);
    const int64_t result = ride->result;
    delete_pass(ride);
    return result;
}

/* x goes through all layers on another thread. reads: may be NULL. NULL when the thread cannot be had. */
OM_EXPORT om_pass *om_pass_start(const om_span *run, const om_span_token *token, om_slot_table *slot_table, om_reads *reads) {
    om_pass *ride = new_pass(run, token, slot_table, reads);
    if (ride == NULL) return NULL;
    if (pthread_create(&ride->thread, NULL, pass_through_layers, ride) == 0) {
        om_pool_place_caller(ride->thread);
        return ride;
    }
    delete_pass(ride);
    return NULL;
}

/* Wait, but not for ever, for the first layer from `first` on that needs something. Returns it, and what that is, once; the
 * number of layers when all are done; -1 when memory was short; -2 when there is nothing yet. */
OM_EXPORT int64_t om_pass_next(om_pass *ride, int64_t first, double limit_s, int32_t *needs) {
    const struct timespec deadline = om_deadline(limit_s);
    int64_t at = first;
    int has_time = 1;
    pthread_mutex_lock(&ride->slot_table->lock);
    for (;;) {
        while (at < ride->num_routed && !ride->needs[at]) at++;
        if (at < ride->num_routed || ride->result != OM_UNDER_WAY || !has_time) break;
        has_time = pthread_cond_timedwait(&ride->told, &ride->slot_table->lock, &deadline) == 0;
    }
    *needs = 0;
    if (at >= ride->num_routed) {
        at = ride->result;
    } else {
        *needs = ride->needs[at];
        ride->needs[at] = 0;
    }
    pthread_mutex_unlock(&ride->slot_table->lock);
    return at;
}

/* Stop it where it waits for an expert, if it is not over, and free it. */
OM_EXPORT void om_pass_end(om_pass *ride) {
    pthread_mutex_lock(&ride->slot_table->lock);
    ride->is_stopped = 1;
    pthread_cond_broadcast(&ride->slot_table->arrived);
    pthread_mutex_unlock(&ride->slot_table->lock);
    pthread_join(ride->thread, NULL);
    delete_pass(ride);
}
