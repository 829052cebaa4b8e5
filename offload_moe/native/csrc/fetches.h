/* Reads that are queued or under way, and queues of them. */
#ifndef OM_FETCHES_H
#define OM_FETCHES_H

#include "read_part.h"

typedef struct om_fetch om_fetch;
struct om_fetch {
    om_fetch *next; /* in its queue */
    uint8_t *record;
    int64_t key, next_byte; /* the first byte that belongs to no part yet */
    int32_t slot, num_running;
    uint8_t is_queued;                /* there are parts to begin */
    uint8_t is_prefetch, was_prefetch;
    uint8_t is_of_pass;               /* the slot was reserved */
    uint8_t is_wrong, is_reread, has_failed;
    om_part failure;
};

typedef struct {
    om_fetch *first, *last;
} om_queue;

OM_INLINE void om_append(om_queue *queue, om_fetch *fetch) {
    fetch->next = NULL;
    fetch->is_queued = 1;
    if (queue->first == NULL) queue->first = fetch;
    else queue->last->next = fetch;
    queue->last = fetch;
}

OM_INLINE void om_withdraw(om_queue *queue, om_fetch *fetch) {
    om_fetch *before = NULL;
    if (!fetch->is_queued) return;
    for (om_fetch *each = queue->first; each != fetch; each = each->next) before = each;
    if (before == NULL) queue->first = fetch->next;
    else before->next = fetch->next;
    if (queue->last == fetch) queue->last = before;
    fetch->is_queued = 0;
}

#endif
