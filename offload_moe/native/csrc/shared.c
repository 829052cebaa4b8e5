/* A shared expert: added to the result of a token's routed experts, scaled by the sigmoid of its gate if it has one. */
#include "mlp.h"
#include "vector_set.h"

/* out[T, H] += mlp(x[T, H]) * gate. num_rows: OM_MAX_ROWS at most. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_add_shared(const om_shared *shared, const float *x, int64_t num_rows, float *out) {
    const om_vector_set *vectors = om_active_isa()->vectors;
    float weights[OM_MAX_ROWS];
    for (int64_t t = 0; t < num_rows; t++)
        weights[t] = shared->gate == NULL ? 1.0f : vectors->dot(x + t * shared->hidden, shared->gate, shared->hidden);
    if (shared->gate != NULL) vectors->sigmoids(weights, num_rows);
    return om_mlp_add(shared->mlp, x, num_rows, weights, out);
}
