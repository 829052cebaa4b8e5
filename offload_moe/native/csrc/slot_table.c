#include "slot_table.h"

#include <stdlib.h>
#include <string.h>

/* Open a table; the arrays belong to the caller. NULL when memory is short. */
OM_EXPORT om_slot_table *om_slot_table_open(const uint8_t **records, int32_t *leases, int32_t *slots) {
    om_slot_table *slot_table = calloc(1, sizeof *slot_table);
    if (slot_table == NULL) return NULL;
    pthread_mutex_init(&slot_table->lock, NULL);
    pthread_cond_init(&slot_table->arrived, NULL);
    slot_table->records = records;
    slot_table->leases = leases;
    slot_table->slots = slots;
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

/* Continue in these arrays, which belong to the caller, with `num_slots` slots; those that are given up must be FREE. */
OM_EXPORT void om_slot_table_resize(om_slot_table *slot_table, int64_t *keys, uint8_t *states, int64_t num_slots) {
    pthread_mutex_lock(&slot_table->lock);
    const int64_t num_kept = num_slots < slot_table->num_slots ? num_slots : slot_table->num_slots;
    if (num_kept > 0) {
        memcpy(keys, slot_table->keys, (size_t)num_kept * sizeof *keys);
        memcpy(states, slot_table->states, (size_t)num_kept);
    }
    for (int64_t slot = num_kept; slot < num_slots; slot++) {
        keys[slot] = -1;
        states[slot] = OM_SLOT_FREE;
    }
    slot_table->keys = keys;
    slot_table->states = states;
    slot_table->num_slots = num_slots;
    pthread_mutex_unlock(&slot_table->lock);
}

void om_slot_table_empty(om_slot_table *slot_table, int32_t slot, uint8_t state) {
    const int64_t key = slot_table->keys[slot];
    if (key >= 0) {
        slot_table->records[key] = NULL;
        slot_table->slots[key] = -1;
    }
    slot_table->keys[slot] = -1;
    slot_table->states[slot] = state;
}

void om_slot_table_begin(om_slot_table *slot_table, int64_t key, int32_t slot) {
    if (slot_table->keys[slot] != key) om_slot_table_empty(slot_table, slot, OM_SLOT_FREE);
    slot_table->records[key] = OM_COMING;
    slot_table->slots[key] = slot;
    slot_table->keys[slot] = key;
    slot_table->states[slot] = OM_SLOT_LOADING;
}

void om_slot_table_arrive(om_slot_table *slot_table, int32_t slot, const uint8_t *record) {
    if (slot_table->keys[slot] < 0) return; /* the slot was vacated meanwhile */
    slot_table->records[slot_table->keys[slot]] = record;
    slot_table->states[slot] = OM_SLOT_ARRIVED;
    pthread_cond_broadcast(&slot_table->arrived);
}

/* Begin to load an expert into a FREE or RESERVED slot. Returns 0 if it has a slot already. */
OM_EXPORT int om_slot_table_admit(om_slot_table *slot_table, int64_t key, int32_t slot) {
    pthread_mutex_lock(&slot_table->lock);
    const int is_absent = slot_table->slots[key] < 0;
    if (is_absent) om_slot_table_begin(slot_table, key, slot);
    pthread_mutex_unlock(&slot_table->lock);
    return is_absent;
}

/* Enter that a reader without native threads has filled the slot. */
OM_EXPORT void om_slot_table_arrived(om_slot_table *slot_table, int32_t slot, const uint8_t *record) {
    pthread_mutex_lock(&slot_table->lock);
    om_slot_table_arrive(slot_table, slot, record);
    pthread_mutex_unlock(&slot_table->lock);
}

/* Enter that the expert of a slot is RESIDENT. */
OM_EXPORT void om_slot_table_loaded(om_slot_table *slot_table, int32_t slot, const uint8_t *record) {
    pthread_mutex_lock(&slot_table->lock);
    if (slot_table->states[slot] == OM_SLOT_LOADING) om_slot_table_arrive(slot_table, slot, record);
    if (slot_table->keys[slot] >= 0) slot_table->states[slot] = OM_SLOT_RESIDENT;
    pthread_mutex_unlock(&slot_table->lock);
}

/* Empty a slot and set its state, FREE or RESERVED. Returns 0, without a change, while a token pass leases its expert. */
OM_EXPORT int om_slot_table_vacate(om_slot_table *slot_table, int32_t slot, int32_t state) {
    pthread_mutex_lock(&slot_table->lock);
    const int64_t key = slot_table->keys[slot];
    const int is_free = key < 0 || slot_table->leases[key] == 0;
    if (is_free && key >= 0 && slot_table->records[key] == OM_COMING) pthread_cond_broadcast(&slot_table->arrived); /* a pass that waits for the expert needs Python now */
    if (is_free) om_slot_table_empty(slot_table, slot, (uint8_t)state);
    pthread_mutex_unlock(&slot_table->lock);
    return is_free;
}

/* Lease those experts that have arrived, as a token pass does. is_here: 1 for those. */
OM_EXPORT void om_slot_table_lease(om_slot_table *slot_table, const int64_t *keys, int64_t num_keys, uint8_t *is_here) {
    pthread_mutex_lock(&slot_table->lock);
    for (int64_t k = 0; k < num_keys; k++) {
        is_here[k] = (uint8_t)om_is_resident(slot_table, keys[k]);
        slot_table->leases[keys[k]] += is_here[k];
    }
    pthread_mutex_unlock(&slot_table->lock);
}

/* End one lease on each of these experts. */
OM_EXPORT void om_slot_table_release(om_slot_table *slot_table, const int64_t *keys, int64_t num_keys) {
    pthread_mutex_lock(&slot_table->lock);
    for (int64_t k = 0; k < num_keys; k++) slot_table->leases[keys[k]]--;
    pthread_mutex_unlock(&slot_table->lock);
}
