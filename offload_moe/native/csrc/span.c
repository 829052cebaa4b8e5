/* A decode step of consecutive decoder layers on a thread of its own, which fetches missing experts.
 *
 * N rows in fp32, each a token; per layer the calls of `layer.c` and `moe.c`, or `mlp.c` where it is dense. H hidden, E experts,
 * K chosen by each row. `at` counts layers with experts.
 * An expert that it cannot fetch is a need that Python serves; the resident experts are computed meanwhile. An expert that several
 * rows chose is computed once, for all of them; each row's sum is in ascending order of its own experts, so it has the bits of a
 * pass of that row alone. */
#define _GNU_SOURCE
#include "deadline.h"
#include "float_mode.h"
#include "job.h"
#include "reads.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MAX_PAIRS (OM_MAX_ROWS * OM_MAX_TOP_K)

struct om_pass {
    const om_span *span;
    const om_span_rows *rows;
    om_slot_table *slot_table; /* its lock guards the fields below */
    om_reads *reads;         /* NULL: every missing expert is a need */
    pthread_t thread;
    pthread_cond_t changed;
    int64_t num_routed;      /* layers whose routers have been computed */
    int64_t result;          /* how many layers with experts are done, or -1 when memory was short; OM_UNDER_WAY until then */
    int is_stopped;
    uint8_t needs[];         /* [layers]: needs that om_pass_next has not returned yet */
};

/* The experts of all rows in ascending order, and their pairs: a row that chose an expert. */
typedef struct {
    int64_t num_experts;
    int64_t keys[MAX_PAIRS];
    const uint8_t *records[MAX_PAIRS]; /* of those that are leased; NULL until then */
    int32_t first_pairs[MAX_PAIRS + 1]; /* the pairs of expert n: first_pairs[n] to first_pairs[n + 1] */
    int32_t choices[MAX_PAIRS];         /* of each pair: row * K + its place among what the router chose for the row */
    int has_need;                       /* of experts that could not be fetched */
} om_chosen;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static const om_span_layer *layer_of(const om_span *span, int64_t at) { return span->layers + span->with_experts[at]; }

static int64_t choices_of(const om_span *span, const om_span_rows *rows) { return rows->num_rows * span->top_k; }

static void sort_chosen(const om_span *span, const om_span_rows *rows, int64_t at, om_chosen *chosen) {
    const int64_t count = choices_of(span, rows), *ids = rows->ids + at * count;
    chosen->num_experts = chosen->has_need = 0;
    for (int32_t c = 0; c < count; c++) {
        int64_t place = c;
        for (; place > 0 && ids[chosen->choices[place - 1]] > ids[c]; place--) chosen->choices[place] = chosen->choices[place - 1];
        chosen->choices[place] = c;
    }
    for (int32_t pair = 0; pair < count; pair++) {
        const int64_t key = layer_of(span, at)->first_key + ids[chosen->choices[pair]], n = chosen->num_experts;
        if (n > 0 && chosen->keys[n - 1] == key) continue;
        chosen->keys[n] = key;
        chosen->records[n] = NULL;
        chosen->first_pairs[chosen->num_experts++] = pair;
    }
    chosen->first_pairs[chosen->num_experts] = (int32_t)count;
}

/* Evaluate the routers of the next layers ahead, for the last row. Returns 0, or -1 when memory is short. */
static int guess(const om_span *span, const om_span_rows *rows, int64_t at) {
    const float *residual = rows->residual + (rows->num_rows - 1) * span->hidden;
    float *normed = rows->guess_space, *logits = normed + span->hidden, *weights = logits + span->num_experts;
    for (int64_t ahead = 0; ahead < rows->num_ahead && at + 1 + ahead < span->num_with_experts; ahead++) {
        int64_t *ids = rows->guesses + (at * rows->num_ahead + ahead) * span->top_k;
        if (om_layer_guess(layer_of(span, at + 1 + ahead)->layer, residual, normed, logits, weights, ids) != 0) return -1;
    }
    return 0;
}

/* Fetch the likeliest guesses if they are absent, and note how all were found (lock held). */
static void fetch_guesses(const om_pass *pass, int64_t at) {
    const om_span *span = pass->span;
    const om_span_rows *rows = pass->rows;
    for (int64_t ahead = 0; ahead < rows->num_ahead && at + 1 + ahead < span->num_with_experts; ahead++) {
        const int64_t first = (at * rows->num_ahead + ahead) * span->top_k;
        for (int64_t k = 0; k < span->top_k; k++) {
            const int64_t key = layer_of(span, at + 1 + ahead)->first_key + rows->guesses[first + k];
            uint8_t *found = rows->guesses_found + first + k;
            if (pass->slot_table->records[key] != NULL) *found = OM_HIT;
            else *found = k < rows->ranks[ahead] && pass->reads != NULL && om_reads_fetch(pass->reads, key, 1) ? OM_FETCHED : OM_MISSING;
        }
    }
}

/* Fetch the absent ones of a layer's experts (lock held). Returns whether all could be fetched. */
static int fetch_chosen(const om_pass *pass, int64_t at, const om_chosen *chosen) {
    uint8_t *found = pass->rows->found + at * choices_of(pass->span, pass->rows);
    int is_well = 1;
    for (int64_t n = 0; n < chosen->num_experts; n++) {
        const int64_t key = chosen->keys[n];
        const uint8_t how = chosen->records[n] != NULL                      ? OM_HIT
                            : pass->slot_table->records[key] == OM_COMING ? OM_ARRIVING
                                                                            : OM_MISSING;
        for (int32_t pair = chosen->first_pairs[n]; pair < chosen->first_pairs[n + 1]; pair++) found[chosen->choices[pair]] = how;
        if (how == OM_ARRIVING && pass->reads != NULL) om_reads_promote(pass->reads, key);
        if (how == OM_MISSING) is_well &= pass->reads != NULL && om_reads_fetch(pass->reads, key, 0);
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
    for (int32_t k = 0; k < chosen->num_experts; k++)
        if (chosen->records[k] == NULL && om_is_resident(pass->slot_table, chosen->keys[k])) {
            pass->slot_table->leases[chosen->keys[k]]++;
            chosen->records[k] = pass->slot_table->records[chosen->keys[k]];
            places[num_leased++] = k;
        }
    return num_leased;
}

static void release(const om_pass *pass, const om_chosen *chosen) {
    pthread_mutex_lock(&pass->slot_table->lock);
    for (int64_t k = 0; k < chosen->num_experts; k++)
        if (chosen->records[k] != NULL) pass->slot_table->leases[chosen->keys[k]]--;
    pthread_mutex_unlock(&pass->slot_table->lock);
}

/* Lease and fetch the experts that the router has chosen for all rows. Returns the number of resident ones. */
static int64_t begin_layer(om_pass *pass, int64_t at, om_chosen *chosen, int32_t *places) {
    const int64_t end = layer_of(pass->span, at)->first_key + pass->span->num_experts;
    pthread_mutex_lock(&pass->slot_table->lock);
    const int64_t num_leased = lease_resident(pass, chosen, places);
    if (pass->reads != NULL) om_reads_drop_wrong(pass->reads, end, chosen->keys, chosen->num_experts);
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
    for (int64_t k = 0; k < chosen->num_experts; k++)
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
        if (pass->reads != NULL && om_reads_help(pass->reads)) continue;
        pthread_cond_wait(&pass->slot_table->arrived, &pass->slot_table->lock);
    }
    pthread_mutex_unlock(&pass->slot_table->lock);
    pass->rows->stalls[at] += seconds() - began;
    return num_leased;
}

/* The pairs of some experts, as `om_moe_forward` takes them. */
typedef struct {
    const uint8_t *records[MAX_PAIRS];
    int32_t offsets[MAX_PAIRS + 1], row_ids[MAX_PAIRS];
    float weights[MAX_PAIRS];
} om_pairs;

static void gather_pairs(const om_pass *pass, int64_t at, const om_chosen *chosen, const int32_t *places, int64_t num_experts,
                         om_pairs *pairs) {
    const int64_t top_k = pass->span->top_k;
    const float *weights = pass->rows->weights + at * choices_of(pass->span, pass->rows);
    int32_t count = pairs->offsets[0] = 0;
    for (int64_t n = 0; n < num_experts; n++) {
        pairs->records[n] = chosen->records[places[n]];
        for (int32_t pair = chosen->first_pairs[places[n]]; pair < chosen->first_pairs[places[n] + 1]; pair++, count++) {
            pairs->row_ids[count] = (int32_t)(chosen->choices[pair] / top_k);
            pairs->weights[count] = weights[chosen->choices[pair]] * layer_of(pass->span, at)->weight_scale;
        }
        pairs->offsets[n + 1] = count;
    }
}

/* Where inputs are scaled, each pair has a row of its own, and its weight is 1 afterwards. */
static int forward(const om_pass *pass, int64_t at, om_pairs *pairs, const int32_t *out_ids, int64_t num_experts, float *out) {
    const om_span_layer *layer = layer_of(pass->span, at);
    const int64_t hidden = pass->span->hidden, num_pairs = pairs->offsets[num_experts];
    int32_t own_rows[MAX_PAIRS];
    if (!layer->scales_inputs)
        return om_moe_forward(layer->experts, pass->rows->normed, pass->rows->num_rows, OM_F32, pairs->records, pairs->offsets,
                              pairs->row_ids, out_ids, pairs->weights, num_experts, out, OM_F32, 0);
    om_scale_inputs(pass->rows->normed, hidden, pairs->row_ids, num_pairs, pairs->weights, own_rows, pass->rows->scaled);
    return om_moe_forward(layer->experts, pass->rows->scaled, num_pairs, OM_F32, pairs->records, pairs->offsets, own_rows,
                          out_ids != NULL ? out_ids : pairs->row_ids, pairs->weights, num_experts, out, OM_F32, 0);
}

/* x[N, H] = the weighted sums of the experts, all of which are leased. */
static int compute_all(const om_pass *pass, int64_t at, const om_chosen *chosen, const int32_t *places) {
    om_pairs pairs;
    gather_pairs(pass, at, chosen, places, chosen->num_experts, &pairs);
    return forward(pass, at, &pairs, NULL, chosen->num_experts, pass->rows->x);
}

/* Each pair of these experts sets its part of `pairs`, a row of which are K parts in ascending order of the experts. */
static int compute_some(const om_pass *pass, int64_t at, const om_chosen *chosen, const int32_t *places, int64_t num_experts) {
    int32_t parts[MAX_PAIRS], out_ids[MAX_PAIRS], num_parts[OM_MAX_ROWS] = {0}, count = 0;
    om_pairs pairs;
    gather_pairs(pass, at, chosen, places, num_experts, &pairs);
    for (int32_t pair = 0; pair < chosen->first_pairs[chosen->num_experts]; pair++) {
        const int32_t row = (int32_t)(chosen->choices[pair] / pass->span->top_k);
        parts[pair] = (int32_t)(row * pass->span->top_k + num_parts[row]++);
    }
    for (int64_t n = 0; n < num_experts; n++)
        for (int32_t pair = chosen->first_pairs[places[n]]; pair < chosen->first_pairs[places[n] + 1]; pair++)
            out_ids[count++] = parts[pair];
    return forward(pass, at, &pairs, out_ids, num_experts, pass->rows->pairs);
}

/* x = the experts of the layer, the resident ones first. Returns 0, -1 when memory is short, 1 when the token pass is stopped. */
static int run_experts(om_pass *pass, int64_t at, om_chosen *chosen) {
    const int64_t hidden = pass->span->hidden, top_k = pass->span->top_k;
    int32_t places[MAX_PAIRS];
    int64_t num_leased = begin_layer(pass, at, chosen, places), num_done = 0;
    if (num_leased == chosen->num_experts) return compute_all(pass, at, chosen, places);
    for (;;) {
        if (num_leased > 0 && compute_some(pass, at, chosen, places, num_leased) != 0) return -1;
        num_done += num_leased;
        if (num_done == chosen->num_experts) break;
        num_leased = wait_for_more(pass, at, chosen, places);
        if (num_leased == 0) return 1;
    }
    for (int64_t row = 0; row < pass->rows->num_rows; row++)
        om_sum_rows(pass->rows->pairs + row * top_k * hidden, top_k, hidden, pass->rows->x + row * hidden, OM_F32);
    return 0;
}

/* x[N, H] -> residual, normed. The routers' results are NULL for a dense layer. */
static int begin_step(const om_pass *pass, const om_span_layer *layer, float *logits, float *weights, int64_t *ids) {
    const om_span_rows *rows = pass->rows;
    const om_room *rooms = rows->rooms + (layer - pass->span->layers) * rows->num_rows;
    return om_layer_step(layer->layer, rows->x, rows->cos, rows->signed_sin, rooms, rows->num_rows, rows->residual, rows->normed, logits,
                         weights, ids);
}

static void add_residual(const om_pass *pass, const om_span_layer *layer) {
    const om_span_rows *rows = pass->rows;
    for (int64_t i = 0; i < rows->num_rows * pass->span->hidden; i++)
        rows->x[i] = rows->residual[i] + layer->layer->residual_scale * rows->x[i];
}

static int step_dense(const om_pass *pass, const om_span_layer *layer) {
    const om_span_rows *rows = pass->rows;
    if (begin_step(pass, layer, NULL, NULL, NULL) != 0) return -1;
    if (om_mlp_forward(layer->dense, rows->normed, rows->num_rows, OM_F32, rows->x, OM_F32) != 0) return -1;
    add_residual(pass, layer);
    return 0;
}

static int step_layer(om_pass *pass, int64_t at, double began) {
    const om_span *span = pass->span;
    const om_span_rows *rows = pass->rows;
    const om_span_layer *layer = layer_of(span, at);
    const int64_t count = choices_of(span, rows);
    om_chosen chosen;
    if (begin_step(pass, layer, rows->logits + at * rows->num_rows * span->num_experts, rows->weights + at * count,
                   rows->ids + at * count) != 0 ||
        guess(span, rows, at) != 0)
        return -1;
    sort_chosen(span, rows, at, &chosen);
    rows->times[2 * at] = seconds() - began;
    const int status = run_experts(pass, at, &chosen);
    release(pass, &chosen);
    if (status != 0) return status;
    if (layer->shared != NULL && om_add_shared(layer->shared, rows->normed, rows->num_rows, rows->x) != 0) return -1;
    add_residual(pass, layer);
    rows->times[2 * at + 1] = seconds() - began;
    return 0;
}

static om_pass *new_pass(const om_span *span, const om_span_rows *rows, om_slot_table *slot_table, om_reads *reads) {
    const size_t num_layers = (size_t)span->num_with_experts;
    om_pass *pass = calloc(1, sizeof *pass + num_layers);
    if (pass == NULL) return NULL;
    pass->span = span;
    pass->rows = rows;
    pass->slot_table = slot_table;
    pass->reads = reads;
    memset(rows->times, 0, 2 * num_layers * sizeof *rows->times);
    memset(rows->stalls, 0, num_layers * sizeof *rows->stalls);
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
    const om_span *span = pass->span;
    int64_t at = 0;
    int status = 0;
    for (const om_span_layer *layer = span->layers; status == 0 && layer < span->layers + span->num_layers; layer++) {
        status = layer->experts == NULL ? step_dense(pass, layer) : step_layer(pass, at, began);
        at += status == 0 && layer->experts != NULL;
    }
    pthread_mutex_lock(&pass->slot_table->lock);
    pass->result = status < 0 ? -1 : at;
    pthread_cond_signal(&pass->changed);
    pthread_mutex_unlock(&pass->slot_table->lock);
    om_restore_float_mode(callers_mode);
    return NULL;
}

/* Take x through all layers, whose experts must all be resident. Returns the number of layers with experts, or -1 when memory is short. */
OM_EXPORT int64_t om_span_pass(const om_span *span, const om_span_rows *rows, om_slot_table *slot_table) {
    om_pass *pass = new_pass(span, rows, slot_table, NULL);
    if (pass == NULL) return -1;
    pass_through_layers(pass);
    const int64_t result = pass->result;
    delete_pass(pass);
    return result;
}

/* Take x through all layers on another thread. reads: may be NULL. NULL when the thread cannot be made. */
OM_EXPORT om_pass *om_pass_start(const om_span *span, const om_span_rows *rows, om_slot_table *slot_table, om_reads *reads) {
    om_pass *pass = new_pass(span, rows, slot_table, reads);
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
