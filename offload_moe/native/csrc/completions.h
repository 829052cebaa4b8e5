/* The completion queue of reads, and the threads that wait for it. The lock of the slot table guards all of it.
 *
 * Reads that Python submitted, and failures, are drained at once: by the threads that wait for experts or slots, or, if
 * none waits, by the one that attends. Reads of a token pass stay in the queue until Python drains it. */
#ifndef OM_COMPLETIONS_H
#define OM_COMPLETIONS_H

#include "om_kernels.h"

#include <pthread.h>

typedef struct {
    om_completion *ring;
    int64_t *counts;         /* for Python to read without a call: [0] completions to drain, [1] calls of wake */
    int64_t first, count, room;
    int64_t num_promised;    /* completions that reads under way will add */
    int64_t num_ends;        /* in the ring, of reads that have ended */
    int32_t num_waiting, is_unattended, is_closed;
    pthread_cond_t ended, unattended;
} om_completions;

void om_completions_init(om_completions *completions, int64_t *counts);
void om_completions_destroy(om_completions *completions);
/* Returns whether a read can begin: there is memory for its beginning and its end. Promises the end. */
int om_completions_fit(om_completions *completions);
void om_completions_add(om_completions *completions, const om_completion *completion, int is_urgent);
int64_t om_completions_take(om_completions *completions, om_completion *taken, int64_t room);
void om_completions_wait(om_completions *completions, pthread_mutex_t *lock, int64_t num_wakes, double limit_s);
void om_completions_wake(om_completions *completions);
int om_completions_attend(om_completions *completions, pthread_mutex_t *lock, double limit_s);
void om_completions_notice(om_completions *completions);
void om_completions_close(om_completions *completions);

#endif
