/* Records are read in parts, demanded ones first, by threads of their own; see `memory/disk.py` for the sizes of parts.
 *
 * A read that fails is not tried again here: the expert stays on its way until the other side, which is told, has tried. */
#define _GNU_SOURCE
#include "reads.h"

#include "deadline.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_FETCHES 128
#define PAGE 4096

enum { NOTHING = 0 }; /* or OM_READING ... */

typedef struct {
    uint8_t *record;
    int64_t key, sequence, next; /* next: the first byte that is not asked for yet */
    int32_t slot, num_running;
    uint8_t state, is_prefetch, was_prefetch, is_told, is_wrong, is_checked, has_failed; /* is_checked: or being so */
} om_fetch;

struct om_reads {
    om_slot_table *slot_table;
    om_reads_options options;
    pthread_cond_t work, ended;
    om_fetch fetches[MAX_FETCHES];
    int64_t num_fetched;
    int32_t num_threads, num_prefetching, num_spares, least_spares, is_closed, num_users;
    struct {
        uint8_t *record;
        int32_t slot;
    } spares[MAX_FETCHES];
};

static int64_t bytes_of(const om_reads *reads, const om_fetch *fetch) { return reads->options.places[fetch->key].num_bytes; }

int om_reads_are_short(const om_reads *reads) { return reads->num_spares < reads->least_spares; }

void om_reads_use(om_reads *reads) {
    pthread_mutex_lock(&reads->slot_table->lock);
    reads->num_users++;
    pthread_mutex_unlock(&reads->slot_table->lock);
}

void om_reads_leave(om_reads *reads) {
    pthread_mutex_lock(&reads->slot_table->lock);
    const int is_used = --reads->num_users > 0;
    pthread_mutex_unlock(&reads->slot_table->lock);
    if (is_used) return;
    om_slot_table_close(reads->slot_table);
    pthread_cond_destroy(&reads->work);
    pthread_cond_destroy(&reads->ended);
    free(reads);
}

static void give_spare(om_reads *reads, int32_t slot, uint8_t *record) {
    reads->spares[reads->num_spares].slot = slot;
    reads->spares[reads->num_spares++].record = record;
}

int om_reads_fetch(om_reads *reads, int64_t key, int is_prefetch) {
    /* the last spares are for what is demanded */
    if (reads->is_closed || reads->num_spares <= (is_prefetch ? reads->least_spares / 2 : 0)) return 0;
    for (int at = 0; at < MAX_FETCHES; at++) {
        om_fetch *fetch = reads->fetches + at;
        if (fetch->state != NOTHING) continue;
        reads->num_spares--;
        *fetch = (om_fetch){.record = reads->spares[reads->num_spares].record,
                            .slot = reads->spares[reads->num_spares].slot,
                            .key = key,
                            .sequence = reads->num_fetched++,
                            .state = OM_READING,
                            .is_prefetch = (uint8_t)is_prefetch,
                            .was_prefetch = (uint8_t)is_prefetch};
        reads->slot_table->records[key] = OM_COMING;
        pthread_cond_signal(&reads->work); /* all of them at once would take the cores from those who compute */
        return 1;
    }
    return 0;
}

/* The expert on its way is demanded, so that it is not dropped any more. */
OM_EXPORT void om_reads_demand(om_reads *reads, int64_t key) {
    pthread_mutex_lock(&reads->slot_table->lock);
    om_reads_promote(reads, key);
    pthread_mutex_unlock(&reads->slot_table->lock);
}

void om_reads_promote(om_reads *reads, int64_t key) {
    for (int at = 0; at < MAX_FETCHES; at++) {
        om_fetch *fetch = reads->fetches + at;
        if (fetch->state != OM_READING || fetch->key != key || !fetch->is_prefetch) continue;
        fetch->is_prefetch = 0;
        reads->num_prefetching -= fetch->num_running;
        pthread_cond_broadcast(&reads->work);
    }
}

/* The expert is absent again and the slot reserved. */
static void drop(om_reads *reads, om_fetch *fetch) {
    reads->slot_table->records[fetch->key] = NULL;
    give_spare(reads, fetch->slot, fetch->record);
    fetch->state = OM_DROPPED;
}

void om_reads_drop_wrong(om_reads *reads, int64_t end, const int64_t *keys, int64_t num_keys) {
    for (int at = 0; at < MAX_FETCHES; at++) {
        om_fetch *fetch = reads->fetches + at;
        if (fetch->state != OM_READING || !fetch->is_prefetch || fetch->key >= end) continue;
        int is_wanted = 0;
        for (int64_t k = 0; k < num_keys; k++) is_wanted |= keys[k] == fetch->key;
        if (is_wanted) continue;
        fetch->is_wrong = 1;
        if (fetch->num_running == 0 && !fetch->is_checked) drop(reads, fetch);
    }
}

/* Whether all pages of the range are cached; the last is asked first, which is enough as a rule. */
static int is_cached(const om_file *file, int64_t offset, int64_t num_bytes) {
    unsigned char present[1024];
    if (file->pages == NULL || offset + num_bytes > file->num_bytes) return 0;
#if defined(__linux__)
    const int64_t last = (offset + num_bytes - 1) / PAGE * PAGE;
    if (mincore((void *)(uintptr_t)(file->pages + last), PAGE, present) != 0 || !(present[0] & 1)) return 0;
    for (int64_t at = offset; at < last; at += sizeof present * PAGE) {
        const int64_t length = last - at < (int64_t)sizeof present * PAGE ? last - at : (int64_t)sizeof present * PAGE;
        if (mincore((void *)(uintptr_t)(file->pages + at), (size_t)length, present) != 0) return 0;
        for (int64_t page = 0; page < (length + PAGE - 1) / PAGE; page++)
            if (!(present[page] & 1)) return 0;
    }
    return 1;
#else
    (void)present;
    return 0;
#endif
}

/* Returns whether all of it was read. */
static int read_part(om_file *file, uint8_t *to, int64_t offset, int64_t num_bytes) {
    const int is_direct = file->direct >= 0 && !is_cached(file, offset, num_bytes);
    for (int64_t done = 0; done < num_bytes;) {
        const ssize_t count = pread(is_direct ? file->direct : file->cached, to + done, (size_t)(num_bytes - done), offset + done);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return 0;
        done += count;
    }
    return 1;
}

static om_fetch *pick(om_reads *reads) {
    om_fetch *best = NULL;
    for (int at = 0; at < MAX_FETCHES; at++) {
        om_fetch *fetch = reads->fetches + at;
        if (fetch->state != OM_READING || fetch->has_failed || fetch->next == bytes_of(reads, fetch)) continue;
        if (fetch->is_prefetch && reads->num_prefetching >= (reads->options.num_threads + 1) / 2) continue;
        if (best == NULL || fetch->is_prefetch < best->is_prefetch ||
            (fetch->is_prefetch == best->is_prefetch && fetch->sequence < best->sequence))
            best = fetch;
    }
    return best;
}

/* The last part has ended (lock held, but let go while the checksum is made). */
static void finish(om_reads *reads, om_fetch *fetch) {
    const om_place *place = reads->options.places + fetch->key;
    fetch->is_checked = 1;
    if (!fetch->has_failed && !reads->options.is_checked[fetch->key]) {
        pthread_mutex_unlock(&reads->slot_table->lock);
        const int is_right = om_crc32(fetch->record, place->num_bytes, 0) == place->checksum;
        pthread_mutex_lock(&reads->slot_table->lock);
        reads->options.is_checked[fetch->key] = (uint8_t)is_right;
        fetch->has_failed = !is_right;
    }
    if (fetch->has_failed) {
        fetch->state = OM_FAILED;
        return;
    }
    reads->slot_table->records[fetch->key] = fetch->record;
    fetch->state = OM_DONE;
    pthread_cond_broadcast(&reads->slot_table->arrived);
}

static void read_next(om_reads *reads, om_fetch *fetch) {
    const om_place *place = reads->options.places + fetch->key;
    const int64_t start = fetch->next, left = place->num_bytes - start;
    const int64_t wanted = fetch->is_prefetch ? reads->options.prefetch_part_bytes : reads->options.part_bytes;
    const int64_t num_bytes = left < wanted ? left : wanted;
    fetch->next += num_bytes;
    if (num_bytes < left) pthread_cond_signal(&reads->work);
    fetch->num_running++;
    reads->num_prefetching += fetch->is_prefetch;
    pthread_mutex_unlock(&reads->slot_table->lock);
    const int is_read = read_part(reads->options.files + place->file, fetch->record + start, place->offset + start, num_bytes);
    pthread_mutex_lock(&reads->slot_table->lock);
    fetch->num_running--;
    reads->num_prefetching -= fetch->is_prefetch;
    fetch->has_failed |= !is_read;
    if (fetch->num_running > 0) return;
    if (fetch->has_failed || fetch->next == place->num_bytes) finish(reads, fetch);
    else if (fetch->is_wrong && fetch->is_prefetch) drop(reads, fetch);
}

static void *read_all(void *argument) {
    om_reads *reads = argument;
    pthread_mutex_lock(&reads->slot_table->lock);
    while (!reads->is_closed) {
        om_fetch *fetch = pick(reads);
        if (fetch == NULL) pthread_cond_wait(&reads->work, &reads->slot_table->lock);
        else read_next(reads, fetch);
    }
    reads->num_threads--;
    pthread_cond_signal(&reads->ended);
    pthread_mutex_unlock(&reads->slot_table->lock);
    return NULL;
}

/* The arrays belong to the caller. NULL when memory is short or no thread can be had. */
OM_EXPORT om_reads *om_reads_open(om_slot_table *slot_table, const om_reads_options *options) {
    om_reads *reads = calloc(1, sizeof *reads);
    if (reads == NULL) return NULL;
    om_slot_table_use(slot_table);
    reads->slot_table = slot_table;
    reads->options = *options;
    reads->num_users = 1;
    pthread_cond_init(&reads->work, NULL);
    om_init_condition(&reads->ended);
    for (int n = 0; n < options->num_threads; n++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, read_all, reads) != 0) break;
        om_pool_place_anywhere(thread);
        pthread_detach(thread);
        pthread_mutex_lock(&slot_table->lock);
        reads->num_threads++;
        pthread_mutex_unlock(&slot_table->lock);
    }
    if (reads->num_threads > 0) return reads;
    om_reads_leave(reads);
    return NULL;
}

/* Finish what is being read and begin nothing more. Returns whether all has ended in time: else it still uses its memory. */
OM_EXPORT int om_reads_close(om_reads *reads, double limit_s) {
    const struct timespec deadline = om_deadline(limit_s);
    pthread_mutex_lock(&reads->slot_table->lock);
    reads->is_closed = 1;
    pthread_cond_broadcast(&reads->work);
    while (reads->num_threads > 0 && pthread_cond_timedwait(&reads->ended, &reads->slot_table->lock, &deadline) == 0) {}
    const int has_ended = reads->num_threads == 0;
    pthread_mutex_unlock(&reads->slot_table->lock);
    if (has_ended) om_reads_leave(reads);
    return has_ended;
}

OM_EXPORT void om_reads_reserve(om_reads *reads, int32_t slot, uint8_t *record) {
    pthread_mutex_lock(&reads->slot_table->lock);
    give_spare(reads, slot, record);
    pthread_mutex_unlock(&reads->slot_table->lock);
}

/* TokenPasses ask for slots when fewer than these are left; until the next call. */
OM_EXPORT void om_reads_ask_below(om_reads *reads, int32_t least_spares) {
    pthread_mutex_lock(&reads->slot_table->lock);
    reads->least_spares = least_spares;
    pthread_mutex_unlock(&reads->slot_table->lock);
}

/* Returns a slot that was reserved and is not used; -1: there is none. */
OM_EXPORT int32_t om_reads_reclaim(om_reads *reads) {
    pthread_mutex_lock(&reads->slot_table->lock);
    const int32_t slot = reads->num_spares == 0 ? -1 : reads->spares[--reads->num_spares].slot;
    pthread_mutex_unlock(&reads->slot_table->lock);
    return slot;
}

/* The first fetch after that one: a slot can be used again before the other side has heard of its first use. */
static om_fetch *next_begun(om_reads *reads, int64_t sequence) {
    om_fetch *first = NULL;
    for (int at = 0; at < MAX_FETCHES; at++) {
        om_fetch *fetch = reads->fetches + at;
        if (fetch->state != NOTHING && fetch->sequence > sequence && (first == NULL || fetch->sequence < first->sequence))
            first = fetch;
    }
    return first;
}

/* What has happened since the last call. Returns how much of `completions` was filled. */
OM_EXPORT int64_t om_reads_completions(om_reads *reads, om_completion *completions, int64_t room) {
    int64_t count = 0;
    pthread_mutex_lock(&reads->slot_table->lock);
    om_fetch *fetch;
    for (int64_t last = -1; count + 2 <= room && (fetch = next_begun(reads, last)) != NULL;) {
        last = fetch->sequence;
        om_completion entry = {.key = fetch->key, .slot = fetch->slot, .state = OM_READING, .was_prefetch = fetch->was_prefetch};
        if (!fetch->is_told) completions[count++] = entry;
        fetch->is_told = 1;
        if (fetch->state == OM_READING) continue;
        entry.state = fetch->state;
        completions[count++] = entry;
        fetch->state = NOTHING;
    }
    pthread_mutex_unlock(&reads->slot_table->lock);
    return count;
}
