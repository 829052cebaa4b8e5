/* A shared expert of one token: added to the result of the routed experts, scaled by the sigmoid of its gate if it has one. */
#include "job.h"
#include "vector_set.h"

/* out[H] += expert(x[H]) * gate. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_add_shared(const om_shared *shared, const float *x, float *out) {
    static const int32_t offsets[] = {0, 1}, token = 0;
    const om_vector_set *vectors = om_active_isa()->vectors;
    float weight = 1.0f;
    if (shared->gate != NULL) {
        weight = vectors->dot(x, shared->gate, shared->hidden);
        vectors->sigmoids(&weight, 1);
    }
    return om_moe_forward(shared->expert, x, 1, OM_F32, &shared->record, offsets, &token, NULL, &weight, 1, out, OM_F32, 1);
}
