/* The experts and slots of one pool, for token passes, readers and Python. A state machine: no threads, no clock.
 *
 *     FREE --admit--> LOADING --arrive--> ARRIVED --loaded--> RESIDENT --vacate--> FREE
 *     FREE --reserve--> RESERVED --begin--> LOADING;  RESERVED --reclaim--> FREE
 *
 * A token pass computes with an expert from ARRIVED on, and leases it meanwhile: a leased slot is not vacated. Python enters
 * arrivals into its policy and counters and sets RESIDENT then; its policy chooses the slots to vacate. */
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
    int64_t num_users;       /* the last one to leave frees it */
};

void om_slot_table_use(om_slot_table *slot_table);

/* Begin to fill a FREE, RESERVED or LOADING slot with the expert (lock held). */
void om_slot_table_begin(om_slot_table *slot_table, int64_t key, int32_t slot);
/* Enter that the slot holds its expert (lock held). */
void om_slot_table_arrive(om_slot_table *slot_table, int32_t slot, const uint8_t *record);
/* Empty the slot and set its state (lock held). */
void om_slot_table_empty(om_slot_table *slot_table, int32_t slot, uint8_t state);

OM_INLINE int om_is_resident(const om_slot_table *slot_table, int64_t key) { return slot_table->records[key] > OM_COMING; }

#endif
