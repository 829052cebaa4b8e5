/* A shared expert: added to the result of a token's routed experts, scaled by the sigmoid of its gate if it has one. */
#include "float_mode.h"
#include "mlp.h"
#include "vector_set.h"

#define ROWS_AT_ONCE 128

static void find_shares(const om_shared *shared, const float *x, int64_t num_rows, float *shares) {
    const om_vector_set *vectors = om_active_isa()->vectors;
    const uint64_t callers_mode = om_enter_float_mode();
    for (int64_t t = 0; t < num_rows; t++)
        shares[t] = shared->gate == NULL ? 1.0f : vectors->dot(x + t * shared->hidden, shared->gate, shared->hidden);
    if (shared->gate != NULL) vectors->sigmoids(shares, num_rows);
    om_restore_float_mode(callers_mode);
}

/* out[T, H] += mlp(x[T, H]) * gate. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_add_shared(const om_shared *shared, const float *x, int64_t num_rows, float *out) {
    float shares[ROWS_AT_ONCE];
    for (int64_t first = 0; first < num_rows; first += ROWS_AT_ONCE) {
        const int64_t at = first * shared->hidden, count = om_min(ROWS_AT_ONCE, num_rows - first);
        find_shares(shared, x + at, count, shares);
        if (om_mlp_add(shared->mlp, x + at, count, shares, out + at) != 0) return -1;
    }
    return 0;
}
