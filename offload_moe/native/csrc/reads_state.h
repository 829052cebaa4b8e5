/* The state of the reads of one arena, for the files that have its functions. */
#ifndef OM_READS_STATE_H
#define OM_READS_STATE_H

#include "completions.h"
#include "fetches.h"
#include "reads.h"

#define MAX_SPARES 128

struct om_reads {
    om_slot_table *slot_table;
    om_reads_options options;
    pthread_cond_t work, ended;
    om_queue demands, prefetches; /* with parts to begin, the oldest first */
    om_fetch **fetches;           /* by key, until they have ended */
    om_file *files;
    om_read_at *read_at;
    om_completions completions;
    uint8_t *scratch; /* a part for each thread */
    int64_t num_files;
    int32_t num_begun, num_threads, num_prefetching, num_spares, least_spares, is_closed, num_users;
    int32_t is_doubtful; /* a read has failed or given wrong bytes: no checksum is taken as compared any more */
    struct {
        uint8_t *record;
        int32_t slot;
    } spares[MAX_SPARES];
};

OM_INLINE void lock(om_reads *reads) { pthread_mutex_lock(&reads->slot_table->lock); }
OM_INLINE void unlock(om_reads *reads) { pthread_mutex_unlock(&reads->slot_table->lock); }

#endif
