#define _GNU_SOURCE
#include "completions.h"

#include "deadline.h"

#include <stdlib.h>

#define LEAST_ROOM 64

enum { TO_DRAIN = 0, WAKES = 1 };

static void set(om_completions *completions, int which, int64_t value) {
    __atomic_store_n(completions->counts + which, value, __ATOMIC_RELAXED);
}

void om_completions_init(om_completions *completions, int64_t *counts) {
    completions->counts = counts;
    om_init_condition(&completions->ended);
    om_init_condition(&completions->unattended);
}

void om_completions_destroy(om_completions *completions) {
    pthread_cond_destroy(&completions->ended);
    pthread_cond_destroy(&completions->unattended);
    free(completions->ring);
}

int om_completions_fit(om_completions *completions) {
    const int64_t needed = completions->count + completions->num_promised + 2;
    if (needed > completions->room) {
        const int64_t room = needed < LEAST_ROOM ? LEAST_ROOM : 2 * needed;
        om_completion *ring = malloc((size_t)room * sizeof *ring);
        if (ring == NULL) return 0;
        for (int64_t n = 0; n < completions->count; n++) ring[n] = completions->ring[(completions->first + n) % completions->room];
        free(completions->ring);
        completions->ring = ring;
        completions->room = room;
        completions->first = 0;
    }
    completions->num_promised++;
    return 1;
}

void om_completions_add(om_completions *completions, const om_completion *completion, int is_urgent) {
    completions->ring[(completions->first + completions->count++) % completions->room] = *completion;
    set(completions, TO_DRAIN, completions->count);
    if (completion->state == OM_READING) return;
    completions->num_promised--;
    completions->num_ends++;
    if (completions->num_waiting > 0) pthread_cond_broadcast(&completions->ended);
    else if (is_urgent) om_completions_notice(completions);
}

int64_t om_completions_take(om_completions *completions, om_completion *taken, int64_t room) {
    int64_t num_taken = 0;
    for (; completions->count > 0 && num_taken < room; completions->count--) {
        taken[num_taken] = completions->ring[completions->first];
        completions->num_ends -= taken[num_taken++].state != OM_READING;
        completions->first = (completions->first + 1) % completions->room;
    }
    set(completions, TO_DRAIN, completions->count);
    return num_taken;
}

void om_completions_wait(om_completions *completions, pthread_mutex_t *lock, int64_t num_wakes, double limit_s) {
    const struct timespec deadline = om_deadline(limit_s);
    completions->num_waiting++;
    while (!completions->is_closed && completions->num_ends == 0 && completions->counts[WAKES] == num_wakes &&
           pthread_cond_timedwait(&completions->ended, lock, &deadline) == 0) {}
    completions->num_waiting--;
}

void om_completions_wake(om_completions *completions) {
    set(completions, WAKES, completions->counts[WAKES] + 1);
    pthread_cond_broadcast(&completions->ended);
}

int om_completions_attend(om_completions *completions, pthread_mutex_t *lock, double limit_s) {
    const struct timespec deadline = om_deadline(limit_s);
    while (!completions->is_closed && !completions->is_unattended &&
           pthread_cond_timedwait(&completions->unattended, lock, &deadline) == 0) {}
    completions->is_unattended = 0;
    return !completions->is_closed;
}

void om_completions_notice(om_completions *completions) {
    completions->is_unattended = 1;
    pthread_cond_signal(&completions->unattended);
}

void om_completions_close(om_completions *completions) {
    completions->is_closed = 1;
    pthread_cond_broadcast(&completions->ended);
    pthread_cond_broadcast(&completions->unattended);
}
