/* Which expert is in which slot, decided on the card: between the first and the last kernel of a token nothing else changes it.
 *
 *   resolve: which experts are here; raises `stop` where one can neither be fetched nor be left to the host
 *   admit: slots for those that are missing   fetch: their records   take: rows that the host has computed
 *   apply: the host's changes, before a token or a continuation   finish: the end of a token
 */
#include "pass.h"

static __device__ __forceinline__ unsigned stamp_of(const om_card_state *state, int layer, int num_layers) {
    return (unsigned)state->token * (unsigned)num_layers + (unsigned)layer + 1u;
}

/* Whether pair i is the first one with its expert. */
static __device__ __forceinline__ int is_first(const int *ids, int i) {
    for (int j = 0; j < i; j++)
        if (ids[j] == ids[i]) return 0;
    return 1;
}

extern "C" __global__ void __launch_bounds__(OM_APPLY_THREADS) om_apply(const om_card_apply_params p) {
    const int i = (int)(blockIdx.x * OM_APPLY_THREADS + threadIdx.x);
    if (i >= p.num_edits) return;
    const int kind = p.edits[i].kind, at = p.edits[i].index;
    const om_card_address value = p.edits[i].value;
    if (kind == OM_EDIT_SLOT_OF) p.tables.slot_of[at] = (int)value;
    if (kind == OM_EDIT_KEY_OF) p.tables.key_of[at] = (int)value;
    if (kind == OM_EDIT_USED) p.tables.used[at] = (unsigned)value;
    if (kind == OM_EDIT_SOURCE) p.tables.source[at] = value;
    if (kind == OM_EDIT_POSITION) p.state->positions[at] = (int)value;
    if (kind == OM_EDIT_ADVANCE) p.state->advance[at] = (int)value;
    if (kind == OM_EDIT_TOKEN) p.state->tokens[at] = (int)value;
    if (kind == OM_EDIT_ROWS) p.state->num_rows = (int)value;
    if (kind == OM_EDIT_MODE) p.state->mode = (int)value;
    if (kind == OM_EDIT_OWNED) p.state->num_owned = (int)value;
    if (kind == OM_EDIT_SLOTS) p.state->num_slots = (int)value;
    if (kind == OM_EDIT_STOP) p.state->stop = (int)value;
    if (kind == OM_EDIT_PASS) p.state->token = (int)value;
    if (kind == OM_EDIT_TEMPERATURE) p.state->draws[at].temperature = __uint_as_float((unsigned)value);
    if (kind == OM_EDIT_TOP_P) p.state->draws[at].top_p = __uint_as_float((unsigned)value);
    if (kind == OM_EDIT_TOP_K) p.state->draws[at].top_k = (int)value;
    if (kind == OM_EDIT_SEED) p.state->draws[at].seed = value;
    if (kind == OM_EDIT_MOVE) p.state->reads[at] = (int)value, p.state->leaves[at] = (int)(value >> 32);
    if (kind == OM_EDIT_WORTHS) ((om_card_address *)p.tables.worth)[at] = value;
}

extern "C" __global__ void __launch_bounds__(OM_RESOLVE_THREADS) om_resolve(const om_card_resolve_params p) {
    __shared__ int ids[OM_CARD_PAIRS], found[OM_CARD_PAIRS], num_distinct, num_missing, has_no_source;
    if (*p.pass.stop) return;
    const int t = (int)threadIdx.x, num_pairs = *p.pass.num_rows * p.top_k, most = p.max_rows * p.top_k;
    const unsigned now = stamp_of(p.state, p.layer, p.num_layers);
    const int is_stepwise = p.state->mode == OM_CARD_STEPWISE, is_again = p.log[0] == p.state->token;
    if (t == 0) num_distinct = num_missing = has_no_source = 0;
    for (int i = t; i < num_pairs; i += OM_RESOLVE_THREADS) ids[i] = p.ids[i];
    __syncthreads();
    for (int i = t; i < num_pairs; i += OM_RESOLVE_THREADS) {
        const int key = p.first_key + ids[i], slot = p.tables.slot_of[key];
        found[i] = slot >= 0 ? OM_CARD_HIT : OM_CARD_MISSED;
        if (is_first(ids, i)) atomicAdd(&num_distinct, 1);
        if (slot < 0) atomicAdd(&num_missing, 1);
        if (slot < 0 && !p.tables.source[key]) atomicExch(&has_no_source, 1);
    }
    __syncthreads();
    const int stop = num_missing == 0 || is_stepwise ? 0
        : num_distinct > p.state->num_owned          ? OM_STOP_SLOTS
        : has_no_source                              ? OM_STOP_MISSING
                                                     : 0;
    for (int i = t; i < num_pairs; i += OM_RESOLVE_THREADS) {
        const int slot = p.tables.slot_of[p.first_key + ids[i]];
        if (!stop && slot >= 0 && is_first(ids, i)) p.tables.used[slot] = now;
        p.hits[i] = slot >= 0 ? p.tables.memory[slot] : 0;
        if (!is_again) {
            int *line = p.log + OM_CARD_LOG_HEAD + i;
            line[0] = ids[i], line[most] = __float_as_int(p.weights[i]), line[2 * most] = found[i];
        }
        if (stop || is_stepwise) p.notice->ids[i] = ids[i], p.notice->found[i] = found[i], p.notice->weights[i] = p.weights[i];
    }
    for (int i = num_pairs + t; i < most; i += OM_RESOLVE_THREADS) p.hits[i] = 0;
    if (is_stepwise && num_missing)
        for (int i = t; i < *p.pass.num_rows * p.hidden; i += OM_RESOLVE_THREADS) p.host_normed[i] = p.normed[i];
    __threadfence_system(); /* each thread's own writes, before the stamp that the host waits for */
    __syncthreads();
    if (t == 0) {
        if (!is_again) p.log[0] = p.state->token, p.log[1] = 0;
        if (stop || is_stepwise) {
            p.notice->layer = p.layer, p.notice->stop = stop;
            if (stop) p.state->stop = stop;
            __threadfence_system();
            p.notice->stamp = now;
        }
    }
}

/* The device's slot that is worth least, of equals the one used longest ago, of these the first, and none that this layer uses;
 * as (worth, stamp, slot). What was used since this layer's last turn is worth most: the host's worths are older. */
static __device__ __forceinline__ unsigned long long least_slot(const om_card_tables &tables, int num_slots, unsigned now, int num_layers) {
    unsigned long long least = ~0ull;
    for (int s = (int)threadIdx.x; s < num_slots; s += OM_ADMIT_THREADS) {
        const int key = tables.key_of[s];
        const int is_fresh = now - tables.used[s] < (unsigned)num_layers;
        const unsigned long long worth = key < 0 ? 0 : is_fresh ? OM_CARD_MOST_WORTH : tables.worth[key];
        const unsigned long long rank = worth << 56 | (unsigned long long)tables.used[s] << OM_CARD_SLOT_BITS | (unsigned)s;
        if (key >= OM_CARD_EMPTY && tables.used[s] != now && rank < least) least = rank;
    }
    for (int d = 16; d; d >>= 1) {
        const unsigned long long other = __shfl_xor_sync(0xffffffffu, least, d);
        least = other < least ? other : least;
    }
    return least;
}

/* Give slot s to the expert of a key, and note it (one thread). */
static __device__ __forceinline__ void take_slot(const om_card_admit_params &p, int s, int key, unsigned now) {
    const int evicted = p.tables.key_of[s], most = p.max_rows * p.top_k, n = p.fetches->count, change = p.log[1];
    int *line = p.log + OM_CARD_LOG_HEAD + 3 * most + 3 * change;
    if (evicted >= 0) p.tables.slot_of[evicted] = -1;
    p.tables.key_of[s] = key, p.tables.slot_of[key] = s, p.tables.used[s] = now;
    p.fetches->source[n] = p.tables.source[key], p.fetches->slot[n] = p.tables.memory[s], p.fetches->count = n + 1;
    line[0] = s, line[1] = evicted, line[2] = key, p.log[1] = change + 1;
}

extern "C" __global__ void __launch_bounds__(OM_ADMIT_THREADS) om_admit(const om_card_admit_params p) {
    __shared__ unsigned long long least[OM_ADMIT_THREADS / 32];
    if (*p.pass.stop) return;
    const int t = (int)threadIdx.x, num_pairs = *p.pass.num_rows * p.top_k, most = p.max_rows * p.top_k;
    const unsigned now = stamp_of(p.state, p.layer, p.num_layers);
    if (t == 0) p.fetches->count = 0;
    for (int i = 0; i < num_pairs; i++) {
        if (p.hits[i] || !is_first(p.ids, i)) continue; /* the same for all threads */
        const unsigned long long mine = least_slot(p.tables, p.state->num_slots, now, p.num_layers);
        if (t % 32 == 0) least[t / 32] = mine;
        __syncthreads();
        if (t == 0) {
            unsigned long long best = least[0];
            for (int w = 1; w < OM_ADMIT_THREADS / 32; w++) best = least[w] < best ? least[w] : best;
            take_slot(p, (int)(best & ((1u << OM_CARD_SLOT_BITS) - 1)), p.first_key + p.ids[i], now);
        }
        __syncthreads();
    }
    for (int i = t; i < most; i += OM_ADMIT_THREADS)
        p.fetched[i] = i >= num_pairs || p.hits[i] ? 0 : p.tables.memory[p.tables.slot_of[p.first_key + p.ids[i]]];
}

extern "C" __global__ void __launch_bounds__(OM_FETCH_THREADS) om_fetch(const om_card_fetch_params p) {
    if (*p.pass.stop) return;
    if ((int)blockIdx.y >= p.fetches->count) return;
    const uint4 *from = (const uint4 *)p.fetches->source[blockIdx.y];
    uint4 *to = (uint4 *)p.fetches->slot[blockIdx.y];
    const long long step = (long long)gridDim.x * OM_FETCH_THREADS, end = p.record_bytes / 16;
    for (long long i = (long long)blockIdx.x * OM_FETCH_THREADS + threadIdx.x; i < end; i += step) to[i] = from[i];
}

extern "C" __global__ void __launch_bounds__(OM_TAKE_THREADS) om_take(const om_card_take_params p) {
    if (*p.pass.stop) return;
    const int i = (int)blockIdx.x, row = i / p.top_k;
    if (row >= *p.pass.num_rows || p.hits[i]) return;
    int rank = 0;
    for (int k = row * p.top_k; k < (row + 1) * p.top_k; k++) rank += p.ids[k] < p.ids[i];
    const long long first = ((long long)row * p.stride + rank) * p.hidden;
    for (int c = (int)threadIdx.x; c < p.hidden; c += OM_TAKE_THREADS) p.pairs[first + c] = p.host_pairs[first + c];
}

extern "C" __global__ void __launch_bounds__(OM_FINISH_THREADS) om_finish(const om_card_finish_params p) {
    if (*p.pass.stop) return;
    const int t = (int)threadIdx.x;
    if (t < *p.pass.num_rows) {
        p.notice->tokens[t] = p.state->tokens[t];
        p.state->positions[t] += p.state->advance[t];
    }
    __threadfence_system();
    __syncthreads();
    if (t == 0) {
        const int token = p.state->token;
        p.state->token = token + 1;
        p.notice->done = token;
    }
}
