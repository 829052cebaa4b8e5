/* Which expert is in which slot of one pool, as token passes, readers and Python see it. A state machine: no threads, no clock.
 *
 *     FREE --admit--> LOADING --arrive--> ARRIVED --loaded--> RESIDENT --vacate--> FREE
 *     FREE --reserve--> RESERVED --begin--> LOADING;  RESERVED --reclaim--> FREE
 *
 * A token pass computes with an expert from ARRIVED on, and leases it meanwhile: a leased slot is not vacated. Python enters
 * what has arrived into its policy and its counters, and calls it RESIDENT then; it picks what to vacate. */
#ifndef OM_SLOT_TABLE_H
#define OM_SLOT_TABLE_H

#include "om_kernels.h"

#include <pthread.h>

#define OM_COMING ((const uint8_t *)1)

struct om_slot_table {
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    const uint8_t **records; /* by key: where the expert is, once it has arrived, OM_COMING on its way, NULL absent */
    int32_t *leases;         /* by key: how many token passes compute with it */
    int32_t *slots;          /* by key: its slot, -1 absent */
    int64_t *keys;           /* by slot: its expert, -1 none */
    uint8_t *states;         /* by slot: OM_SLOT_FREE ... */
    int64_t num_slots;
    int64_t num_users;       /* in whatever order Python forgets them, the last of them frees it */
};

void om_slot_table_use(om_slot_table *slot_table);

/* The slot, which is FREE, RESERVED or LOADING, is being filled with the expert (lock held). */
void om_slot_table_begin(om_slot_table *slot_table, int64_t key, int32_t slot);
/* It holds the expert now (lock held). */
void om_slot_table_arrive(om_slot_table *slot_table, int32_t slot, const uint8_t *record);
/* It holds no expert any more, and has this state (lock held). */
void om_slot_table_empty(om_slot_table *slot_table, int32_t slot, uint8_t state);

OM_INLINE int om_is_resident(const om_slot_table *slot_table, int64_t key) { return slot_table->records[key] > OM_COMING; }

#endif
