/* What Python calls of the reads from other threads: completions are taken, and waited for. */
#define _GNU_SOURCE
#include "reads_state.h"

/* Take the completions since the last call, in their order. Returns their number, `room` at most. */
OM_EXPORT int64_t om_reads_completions(om_reads *reads, om_completion *completions, int64_t room) {
    lock(reads);
    const int64_t count = om_completions_take(&reads->completions, completions, room);
    unlock(reads);
    return count;
}

/* Wait until a read has ended that is not drained, or `om_reads_wake` was called since `num_wakes` was counted. */
OM_EXPORT void om_reads_wait(om_reads *reads, int64_t num_wakes, double limit_s) {
    om_reads_use(reads);
    lock(reads);
    om_completions_wait(&reads->completions, &reads->slot_table->lock, num_wakes, limit_s);
    unlock(reads);
    om_reads_leave(reads);
}

/* End all calls of `om_reads_wait`. */
OM_EXPORT void om_reads_wake(om_reads *reads) {
    lock(reads);
    om_completions_wake(&reads->completions);
    unlock(reads);
}

/* Wait until completions need draining and no thread is in `om_reads_wait`, or for `om_reads_notice`. Returns 0 once closed. */
OM_EXPORT int om_reads_attend(om_reads *reads, double limit_s) {
    om_reads_use(reads);
    lock(reads);
    const int is_open = om_completions_attend(&reads->completions, &reads->slot_table->lock, limit_s);
    unlock(reads);
    om_reads_leave(reads);
    return is_open;
}

/* Let `om_reads_attend` return. */
OM_EXPORT void om_reads_notice(om_reads *reads) {
    lock(reads);
    om_completions_notice(&reads->completions);
    unlock(reads);
}
