#include "residents.h"

#include <stdlib.h>

/* The arrays belong to the caller. NULL when memory is short. */
OM_EXPORT om_residents *om_residents_open(const uint8_t **records, int32_t *leases) {
    om_residents *residents = malloc(sizeof *residents);
    if (residents == NULL) return NULL;
    pthread_mutex_init(&residents->lock, NULL);
    pthread_cond_init(&residents->arrived, NULL);
    residents->records = records;
    residents->leases = leases;
    residents->num_users = 1;
    return residents;
}

void om_residents_use(om_residents *residents) {
    pthread_mutex_lock(&residents->lock);
    residents->num_users++;
    pthread_mutex_unlock(&residents->lock);
}

/* By whoever opened it, and by each other user: the last one frees it. */
OM_EXPORT void om_residents_close(om_residents *residents) {
    pthread_mutex_lock(&residents->lock);
    const int is_used = --residents->num_users > 0;
    pthread_mutex_unlock(&residents->lock);
    if (is_used) return;
    pthread_cond_destroy(&residents->arrived);
    pthread_mutex_destroy(&residents->lock);
    free(residents);
}

/* The expert is on its way now. Returns 0 where it was already, or is resident. */
OM_EXPORT int om_residents_claim(om_residents *residents, int64_t key) {
    pthread_mutex_lock(&residents->lock);
    const int is_absent = residents->records[key] == NULL;
    if (is_absent) residents->records[key] = OM_COMING;
    pthread_mutex_unlock(&residents->lock);
    return is_absent;
}

OM_EXPORT void om_residents_publish(om_residents *residents, int64_t key, const uint8_t *record) {
    pthread_mutex_lock(&residents->lock);
    residents->records[key] = record;
    pthread_cond_broadcast(&residents->arrived);
    pthread_mutex_unlock(&residents->lock);
}

/* Returns whether the expert is absent now; not while a run computes with it. */
OM_EXPORT int om_residents_withdraw(om_residents *residents, int64_t key) {
    pthread_mutex_lock(&residents->lock);
    const int is_free = residents->leases[key] == 0;
    if (is_free && residents->records[key] == OM_COMING) pthread_cond_broadcast(&residents->arrived); /* who waits has to ask */
    if (is_free) residents->records[key] = NULL;
    pthread_mutex_unlock(&residents->lock);
    return is_free;
}
