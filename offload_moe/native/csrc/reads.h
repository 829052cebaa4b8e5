/* The reads of one arena: queues of records, threads that read them in parts, and completions for Python to drain.
 *
 * Python submits reads into slots of its choice; token passes fetch into slots that were reserved for them. The lock of the
 * slot table guards all of it. */
#ifndef OM_READS_H
#define OM_READS_H

#include "slot_table.h"

/* Keep the reads from being freed until `om_reads_leave`; closed meanwhile, they fetch no more. */
void om_reads_use(om_reads *reads);

/* Take a reserved slot and queue the read of an absent expert (lock held). Returns 0 without a slot or memory. */
int om_reads_fetch(om_reads *reads, int64_t key, int is_prefetch);
/* Treat the read of an expert, if it is on its way, as a demand from now on (lock held). */
void om_reads_promote(om_reads *reads, int64_t key);
/* Drop guesses of token passes with keys below `end` that are not among these, unless they are being read (lock held). */
void om_reads_drop_wrong(om_reads *reads, int64_t end, const int64_t *keys, int64_t num_keys);
/* Read a demanded record in the calling thread, if no other has begun to and it is in the page cache (lock held, released
 * meanwhile): quicker than waking a thread and being woken by it. Returns whether there was one. */
int om_reads_help(om_reads *reads);
/* Whether fewer slots are reserved than token passes need (lock held). */
int om_reads_are_short(const om_reads *reads);

#endif
