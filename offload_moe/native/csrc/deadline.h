/* Waits with a limit, on a monotonic clock where a condition variable can wait by one. _GNU_SOURCE comes first. */
#ifndef OM_DEADLINE_H
#define OM_DEADLINE_H

#include "om_kernels.h"

#include <pthread.h>
#include <time.h>

#ifdef __linux__
#define OM_WAIT_CLOCK CLOCK_MONOTONIC
#else
#define OM_WAIT_CLOCK CLOCK_REALTIME
#endif

OM_INLINE void om_init_condition(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
#ifdef __linux__
    pthread_condattr_setclock(&attributes, OM_WAIT_CLOCK);
#endif
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

/* For conditions of `om_init_condition`. */
OM_INLINE struct timespec om_deadline(double limit_s) {
    struct timespec deadline;
    clock_gettime(OM_WAIT_CLOCK, &deadline);
    const double nanoseconds = (double)deadline.tv_nsec + limit_s * 1e9;
    deadline.tv_sec += (time_t)(nanoseconds / 1e9);
    deadline.tv_nsec = (long)(nanoseconds - 1e9 * (double)(time_t)(nanoseconds / 1e9));
    return deadline;
}

#endif
