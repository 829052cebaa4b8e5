/* Which experts are resident, as runs find them: by key, shared with those who bring and evict them.
 *
 * A run leases what it computes with; nobody may withdraw that. Keys are layer * experts per layer + expert. */
#ifndef OM_SLOT_TABLE_H
#define OM_SLOT_TABLE_H

#include "om_kernels.h"

#include <pthread.h>

#define OM_COMING ((const uint8_t *)1)

struct om_slot_table {
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    const uint8_t **records; /* by key: where the expert is resident, OM_COMING on its way, NULL absent */
    int32_t *leases;         /* by key: how many runs compute with it */
    int64_t num_users;       /* in whatever order Python forgets them, the last of them frees it */
};

void om_slot_table_use(om_slot_table *slot_table);

OM_INLINE int om_is_resident(const om_slot_table *slot_table, int64_t key) { return slot_table->records[key] > OM_COMING; }

#endif
