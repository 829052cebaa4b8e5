/* Which experts are resident, as runs find them: by key, shared with those who bring and evict them.
 *
 * A run leases what it computes with; nobody may withdraw that. Keys are layer * experts per layer + expert. */
#ifndef OM_RESIDENTS_H
#define OM_RESIDENTS_H

#include "om_kernels.h"

#include <pthread.h>

#define OM_COMING ((const uint8_t *)1)

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    const uint8_t **records; /* by key: where the expert is resident, OM_COMING on its way, NULL absent */
    int32_t *leases;         /* by key: how many runs compute with it */
    int64_t num_users;       /* in whatever order Python forgets them, the last of them frees it */
} om_residents;

void om_residents_use(om_residents *residents);
void om_residents_close(om_residents *residents);

OM_INLINE int om_is_resident(const om_residents *residents, int64_t key) { return residents->records[key] > OM_COMING; }

#endif
