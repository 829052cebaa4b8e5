/* Records are read in parts, demanded ones first, by threads of their own; see `memory/disk.py` for the sizes of parts.
 *
 * A demand overtakes prefetches between their parts, also those that have begun; prefetches never take all threads.
 * A read that fails is not repeated here, except for a wrong checksum: the expert counts as on its way until Python, which
 * drains the completion, has submitted it again or given it up. */
#define _GNU_SOURCE
#include "reads_state.h"

#include "deadline.h"
#include "job.h"
#include "pieces.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MOST_HELPED (1 << 20) /* bytes: others arrive meanwhile */

static om_queue *queue_of(om_reads *reads, const om_fetch *fetch) { return fetch->is_prefetch ? &reads->prefetches : &reads->demands; }

static void end_fetch(om_reads *reads, om_fetch *fetch) {
    om_withdraw(queue_of(reads, fetch), fetch);
    reads->fetches[fetch->key] = NULL;
    free(fetch);
}

int om_reads_are_short(const om_reads *reads) { return reads->num_spares < reads->least_spares; }

void om_reads_use(om_reads *reads) {
    lock(reads);
    reads->num_users++;
    unlock(reads);
}

/* Called by the opener, by each token pass and by each thread at its end; the last call frees them. */
OM_EXPORT void om_reads_leave(om_reads *reads) {
    lock(reads);
    const int is_used = --reads->num_users > 0;
    unlock(reads);
    if (is_used) return;
    if (reads->fetches != NULL)
        for (int64_t key = 0; key < reads->options.num_keys; key++) free(reads->fetches[key]);
    om_slot_table_close(reads->slot_table);
    pthread_cond_destroy(&reads->work);
    pthread_cond_destroy(&reads->ended);
    om_completions_destroy(&reads->completions);
    free(reads->fetches);
    free(reads->files);
    free(reads->scratch);
    free(reads);
}

static om_fetch *begin(om_reads *reads, int64_t key, int32_t slot, uint8_t *record, int is_prefetch, int is_of_pass) {
    om_fetch *fetch = calloc(1, sizeof *fetch);
    if (fetch == NULL || !om_completions_fit(&reads->completions)) {
        free(fetch);
        return NULL;
    }
    *fetch = (om_fetch){.record = record, .key = key, .slot = slot, .is_of_pass = (uint8_t)is_of_pass,
                        .is_prefetch = (uint8_t)is_prefetch, .was_prefetch = (uint8_t)is_prefetch};
    reads->fetches[key] = fetch;
    om_slot_table_begin(reads->slot_table, key, slot);
    om_append(queue_of(reads, fetch), fetch);
    pthread_cond_signal(&reads->work); /* waking all of them would take the cores from the compute threads */
    return fetch;
}

static void complete(om_reads *reads, const om_fetch *fetch, int32_t state) {
    const om_part *part = &fetch->failure;
    const om_completion completion = {.key = fetch->key, .slot = fetch->slot, .state = state, .was_prefetch = fetch->was_prefetch,
                                      .error = part->error, .was_direct = part->was_direct, .start = part->start,
                                      .num_bytes = part->num_bytes, .num_read = part->num_read};
    om_completions_add(&reads->completions, &completion, !fetch->is_of_pass || state == OM_FAILED);
}

static void give_spare(om_reads *reads, int32_t slot, uint8_t *record) {
    reads->spares[reads->num_spares].slot = slot;
    reads->spares[reads->num_spares++].record = record;
}

int om_reads_fetch(om_reads *reads, int64_t key, int is_prefetch) {
    /* the last spares are for what is demanded */
    if (reads->is_closed || reads->num_spares <= (is_prefetch ? reads->least_spares / 2 : 0)) return 0;
    if (reads->options.places[key].num_bytes == 0) return 0;
    const int at = reads->num_spares - 1;
    om_fetch *fetch = begin(reads, key, reads->spares[at].slot, reads->spares[at].record, is_prefetch, 1);
    if (fetch == NULL) return 0;
    reads->num_spares = at;
    complete(reads, fetch, OM_READING);
    return 1;
}

/* Queue the read of a record into this slot. Returns 1, or -1 when memory is short. Closed, nothing is read. */
OM_EXPORT int om_reads_submit(om_reads *reads, int64_t key, int32_t slot, uint8_t *record, int is_prefetch) {
    lock(reads);
    const int is_well = reads->is_closed || begin(reads, key, slot, record, is_prefetch, 0) != NULL;
    unlock(reads);
    return is_well ? 1 : -1;
}

void om_reads_promote(om_reads *reads, int64_t key) {
    om_fetch *fetch = reads->fetches[key];
    if (fetch == NULL || !fetch->is_prefetch) return;
    const int is_queued = fetch->is_queued;
    om_withdraw(&reads->prefetches, fetch);
    fetch->is_prefetch = 0;
    reads->num_prefetching -= fetch->num_running;
    if (is_queued) om_append(&reads->demands, fetch);
    pthread_cond_broadcast(&reads->work);
}

/* Treat the read of an expert, if it is on its way, as a demand: it cannot be dropped any more. */
OM_EXPORT void om_reads_demand(om_reads *reads, int64_t key) {
    lock(reads);
    om_reads_promote(reads, key);
    unlock(reads);
}

/* Cancel a prefetch that Python submitted, unless a part of it is being read. Returns whether it is cancelled. */
OM_EXPORT int om_reads_cancel(om_reads *reads, int64_t key) {
    lock(reads);
    om_fetch *fetch = reads->fetches[key];
    const int is_idle = fetch != NULL && fetch->is_prefetch && !fetch->is_of_pass && fetch->is_queued && fetch->num_running == 0;
    if (is_idle) {
        reads->completions.num_promised--;
        end_fetch(reads, fetch);
    }
    unlock(reads);
    return is_idle;
}

/* Drop a guess: the expert is absent again and the slot reserved. */
static void drop(om_reads *reads, om_fetch *fetch) {
    om_slot_table_empty(reads->slot_table, fetch->slot, OM_SLOT_RESERVED);
    give_spare(reads, fetch->slot, fetch->record);
    complete(reads, fetch, OM_DROPPED);
    end_fetch(reads, fetch);
}

void om_reads_drop_wrong(om_reads *reads, int64_t end, const int64_t *keys, int64_t num_keys) {
    om_fetch *next;
    for (om_fetch *fetch = reads->prefetches.first; fetch != NULL; fetch = next) {
        next = fetch->next;
        int is_kept = !fetch->is_of_pass || fetch->key >= end;
        for (int64_t k = 0; k < num_keys; k++) is_kept |= keys[k] == fetch->key;
        if (is_kept) continue;
        fetch->is_wrong = 1;
        if (fetch->num_running == 0) drop(reads, fetch);
    }
}

static om_fetch *pick(om_reads *reads) {
    const int32_t most = reads->options.num_threads > 1 ? reads->options.num_threads / 2 : 1;
    if (reads->demands.first != NULL) return reads->demands.first;
    return reads->num_prefetching < most ? reads->prefetches.first : NULL;
}

/* Bring a record into its order in RAM if its bytes are the expert's, and return whether they are (lock held, released meanwhile).
 * Only the first read of each is compared, as files do not change, and every one since a read went wrong.
 * Pieces of other files have no checksum. */
static int accept(om_reads *reads, om_fetch *fetch, const om_place *place, uint8_t *scratch) {
    uint8_t *is_checked = &reads->options.is_checked[fetch->key];
    const int was_checked = (*is_checked && !reads->is_doubtful) || place->num_pieces > 0;
    if (was_checked && place->num_matrices == 0 && place->num_pieces == 0) return 1;
    unlock(reads);
    om_join_pieces(place, fetch->record);
    const int is_right = was_checked || om_crc32(fetch->record, place->num_bytes, 0) == place->checksum;
    if (is_right) om_repack(place->matrices, place->num_matrices, fetch->record, place->to_panels, scratch);
    lock(reads);
    if (!was_checked) *is_checked = (uint8_t)is_right;
    return is_right;
}

/* End a read after its last part (lock held). A transfer may corrupt what the disk has right: a wrong record is read once more. */
static void finish(om_reads *reads, om_fetch *fetch, const om_place *place, uint8_t *scratch) {
    if (!fetch->has_failed && !accept(reads, fetch, place, scratch)) {
        reads->is_doubtful = 1;
        if (!fetch->is_reread && !reads->is_closed) {
            fetch->is_reread = 1;
            fetch->next_byte = 0;
            om_append(queue_of(reads, fetch), fetch);
            return;
        }
        fetch->failure = (om_part){.error = OM_WRONG_CHECKSUM, .num_bytes = place->num_bytes, .num_read = place->num_bytes};
        fetch->has_failed = 1;
    }
    if (!fetch->has_failed) om_slot_table_arrive(reads->slot_table, fetch->slot, fetch->record);
    complete(reads, fetch, fetch->has_failed ? OM_FAILED : OM_DONE);
    end_fetch(reads, fetch);
}

/* Read the next part (lock held, released meanwhile). */
static void read_next(om_reads *reads, om_fetch *fetch, uint8_t *scratch) {
    const om_place place = reads->options.places[fetch->key];
    const om_piece piece = om_piece_at(&place, fetch->next_byte);
    const om_file file = reads->files[piece.file];
    om_read_at *const read_at = reads->read_at;
    om_part part = om_take_part(fetch, &place, &piece, fetch->is_prefetch ? reads->options.prefetch_part_bytes : reads->options.part_bytes);
    if (fetch->next_byte < place.num_bytes) pthread_cond_signal(&reads->work);
    else om_withdraw(queue_of(reads, fetch), fetch);
    fetch->num_running++;
    reads->num_prefetching += fetch->is_prefetch;
    unlock(reads);
    om_read_part(&file, fetch->record, read_at, &part);
    lock(reads);
    fetch->num_running--;
    reads->num_prefetching -= fetch->is_prefetch;
    if (part.error != 0 && !fetch->has_failed) {
        om_withdraw(queue_of(reads, fetch), fetch);
        fetch->has_failed = 1;
        fetch->failure = part;
        reads->is_doubtful |= part.error != EINVAL && part.error != EOPNOTSUPP; /* those refuse direct reads */
    }
    if (fetch->num_running > 0) return;
    if (!fetch->is_queued) finish(reads, fetch, &place, scratch);
    else if (fetch->is_wrong && fetch->is_prefetch) drop(reads, fetch);
}

int om_reads_help(om_reads *reads) {
    om_fetch *fetch = reads->demands.first;
    const om_place *place = fetch == NULL ? NULL : &reads->options.places[fetch->key];
    if (reads->is_closed || reads->read_at != NULL || place == NULL || place->num_bytes > MOST_HELPED) return 0;
    uint8_t *scratch = malloc((size_t)reads->options.scratch_bytes + 1);
    const om_piece piece = om_piece_at(place, fetch->next_byte);
    const int is_quick = scratch != NULL && om_is_cached(reads->files + piece.file, piece.offset, piece.skew + piece.length);
    reads->num_threads++; /* `om_reads_close` waits for this one, too */
    if (is_quick) read_next(reads, fetch, scratch);
    reads->num_threads--;
    pthread_cond_signal(&reads->ended);
    free(scratch);
    return is_quick;
}

static void *read_all(void *argument) {
    om_reads *reads = argument;
    lock(reads);
    uint8_t *scratch = reads->scratch + reads->num_begun++ * reads->options.scratch_bytes;
    while (!reads->is_closed) {
        om_fetch *fetch = pick(reads);
        if (fetch == NULL) pthread_cond_wait(&reads->work, &reads->slot_table->lock);
        else read_next(reads, fetch, scratch);
    }
    reads->num_threads--;
    pthread_cond_signal(&reads->ended);
    unlock(reads);
    om_reads_leave(reads);
    return NULL;
}

/* Open a reader; the arrays belong to the caller. NULL when memory is short or no thread can be made. */
OM_EXPORT om_reads *om_reads_open(om_slot_table *slot_table, const om_reads_options *options) {
    om_reads *reads = calloc(1, sizeof *reads);
    if (reads == NULL) return NULL;
    om_slot_table_use(slot_table);
    reads->slot_table = slot_table;
    reads->options = *options;
    reads->num_users = 1;
    reads->fetches = calloc((size_t)options->num_keys + 1, sizeof *reads->fetches);
    pthread_cond_init(&reads->work, NULL);
    om_init_condition(&reads->ended);
    om_completions_init(&reads->completions, options->counts);
    reads->scratch = malloc((size_t)(options->num_threads * options->scratch_bytes) + 1);
    for (int n = 0; reads->fetches != NULL && reads->scratch != NULL && n < options->num_threads; n++) {
        pthread_t thread;
        lock(reads); /* so that the thread begins after it is counted */
        const int is_there = pthread_create(&thread, NULL, read_all, reads) == 0;
        reads->num_threads += is_there;
        reads->num_users += is_there;
        unlock(reads);
        if (!is_there) break;
        om_pool_place_anywhere(thread);
        pthread_detach(thread);
    }
    if (reads->num_users > 1) return reads;
    om_reads_leave(reads);
    return NULL;
}

/* Finish parts that are being read and begin none. Returns whether all have ended in time: else memory stays in use. */
OM_EXPORT int om_reads_close(om_reads *reads, double limit_s) {
    const struct timespec deadline = om_deadline(limit_s);
    om_reads_use(reads);
    lock(reads);
    reads->is_closed = 1;
    pthread_cond_broadcast(&reads->work);
    om_completions_close(&reads->completions);
    while (reads->num_threads > 0 && pthread_cond_timedwait(&reads->ended, &reads->slot_table->lock, &deadline) == 0) {}
    const int has_ended = reads->num_threads == 0;
    unlock(reads);
    om_reads_leave(reads);
    return has_ended;
}

/* Read parts that begin from now on from this file, which replaces the one with its number. -1 when memory is short. */
OM_EXPORT int om_reads_use_file(om_reads *reads, int32_t number, const om_file *file) {
    lock(reads);
    if (number >= reads->num_files) {
        om_file *files = realloc(reads->files, ((size_t)number + 1) * sizeof *files);
        if (files == NULL) {
            unlock(reads);
            return -1;
        }
        memset(files + reads->num_files, 0, (size_t)(number + 1 - reads->num_files) * sizeof *files);
        reads->files = files;
        reads->num_files = number + 1;
    }
    reads->files[number] = *file;
    unlock(reads);
    return 0;
}

/* Read parts that begin from now on with this function: failing disks, for tests. NULL: with the system's. */
OM_EXPORT void om_reads_read_with(om_reads *reads, om_read_at *read_at) {
    lock(reads);
    reads->read_at = read_at;
    unlock(reads);
}

/* Reserve a slot for token passes to fetch into; 128 at most at a time. */
OM_EXPORT void om_reads_reserve(om_reads *reads, int32_t slot, uint8_t *record) {
    lock(reads);
    give_spare(reads, slot, record);
    unlock(reads);
}

/* Token passes need slots when fewer than these are left. */
OM_EXPORT void om_reads_need_below(om_reads *reads, int32_t least_spares) {
    lock(reads);
    reads->least_spares = least_spares;
    unlock(reads);
}

/* Reclaim a slot that is reserved and not in use. Returns -1 if none is. */
OM_EXPORT int32_t om_reads_reclaim(om_reads *reads) {
    lock(reads);
    const int32_t slot = reads->num_spares == 0 ? -1 : reads->spares[--reads->num_spares].slot;
    unlock(reads);
    return slot;
}
