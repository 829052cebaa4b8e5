/* A shared expert: added to the result of a token's routed experts, scaled by the sigmoid of its gate if it has one. */
#include "float_mode.h"
#include "mlp.h"
#include "vector_set.h"

static void find_shares(const om_shared *shared, const float *x, int64_t num_rows, float *shares) {
    const om_vector_set *vectors = om_active_isa()->vectors;
    const uint64_t callers_mode = om_enter_float_mode();
    for (int64_t t = 0; t < num_rows; t++)
        shares[t] = shared->gate == NULL ? 1.0f : vectors->dot(x + t * shared->hidden, shared->gate, shared->hidden);
    if (shared->gate != NULL) vectors->sigmoids(shares, num_rows);
    om_restore_float_mode(callers_mode);
}

/* out[T, H] += mlp(x[T, H]) * gate. num_rows: OM_MAX_ROWS at most. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_add_shared(const om_shared *shared, const float *x, int64_t num_rows, float *out) {
    float shares[OM_MAX_ROWS];
    find_shares(shared, x, num_rows, shares);
    return om_mlp_add(shared->mlp, x, num_rows, shares, out);
}
