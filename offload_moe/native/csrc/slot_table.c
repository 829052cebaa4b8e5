#include "slot_table.h"

#include <stdlib.h>

/* The arrays belong to the caller. NULL when memory is short. */
OM_EXPORT om_slot_table *om_slot_table_open(const uint8_t **records, int32_t *leases) {
    om_slot_table *slot_table = malloc(sizeof *slot_table);
    if (slot_table == NULL) return NULL;
    pthread_mutex_init(&slot_table->lock, NULL);
    pthread_cond_init(&slot_table->arrived, NULL);
    slot_table->records = records;
    slot_table->leases = leases;
    slot_table->num_users = 1;
    return slot_table;
}

void om_slot_table_use(om_slot_table *slot_table) {
    pthread_mutex_lock(&slot_table->lock);
    slot_table->num_users++;
    pthread_mutex_unlock(&slot_table->lock);
}

/* Called by the opener and by each other user; the last call frees it. */
OM_EXPORT void om_slot_table_close(om_slot_table *slot_table) {
    pthread_mutex_lock(&slot_table->lock);
    const int is_used = --slot_table->num_users > 0;
    pthread_mutex_unlock(&slot_table->lock);
    if (is_used) return;
    pthread_cond_destroy(&slot_table->arrived);
    pthread_mutex_destroy(&slot_table->lock);
    free(slot_table);
}

/* The expert is on its way now. Returns 0 where it was already, or is resident. */
OM_EXPORT int om_slot_table_claim(om_slot_table *slot_table, int64_t key) {
    pthread_mutex_lock(&slot_table->lock);
    const int is_absent = slot_table->records[key] == NULL;
    if (is_absent) slot_table->records[key] = OM_COMING;
    pthread_mutex_unlock(&slot_table->lock);
    return is_absent;
}

OM_EXPORT void om_slot_table_publish(om_slot_table *slot_table, int64_t key, const uint8_t *record) {
    pthread_mutex_lock(&slot_table->lock);
    slot_table->records[key] = record;
    pthread_cond_broadcast(&slot_table->arrived);
    pthread_mutex_unlock(&slot_table->lock);
}

/* Returns whether the expert is absent now; not while a run computes with it. */
OM_EXPORT int om_slot_table_withdraw(om_slot_table *slot_table, int64_t key) {
    pthread_mutex_lock(&slot_table->lock);
    const int is_free = slot_table->leases[key] == 0;
    if (is_free && slot_table->records[key] == OM_COMING) pthread_cond_broadcast(&slot_table->arrived); /* who waits has to ask */
    if (is_free) slot_table->records[key] = NULL;
    pthread_mutex_unlock(&slot_table->lock);
    return is_free;
}
