/* A shared expert: added to the result of a token's routed experts, scaled by the sigmoid of its gate if it has one. */
#include "job.h"
#include "vector_set.h"

/* out[T, H] += expert(x[T, H]) * gate. num_rows: OM_MAX_ROWS at most. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_add_shared(const om_shared *shared, const float *x, int64_t num_rows, float *out) {
    static const int32_t tokens[OM_MAX_ROWS] = {0, 1, 2, 3, 4, 5, 6, 7};
    const int32_t offsets[] = {0, (int32_t)num_rows};
    const om_vector_set *vectors = om_active_isa()->vectors;
    float weights[OM_MAX_ROWS];
    for (int64_t t = 0; t < num_rows; t++)
        weights[t] = shared->gate == NULL ? 1.0f : vectors->dot(x + t * shared->hidden, shared->gate, shared->hidden);
    if (shared->gate != NULL) vectors->sigmoids(weights, num_rows);
    return om_moe_forward(shared->expert, x, num_rows, OM_F32, &shared->record, offsets, tokens, NULL, weights, 1, out, OM_F32, 1);
}
