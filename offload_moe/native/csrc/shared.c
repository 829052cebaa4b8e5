/* A shared expert of one token: added to the result of the routed experts, scaled by the sigmoid of its gate if it has one. */
#include "mlp.h"
#include "vector_set.h"

/* out[H] += mlp(x[H]) * gate. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_add_shared(const om_shared *shared, const float *x, float *out) {
    const om_vector_set *vectors = om_active_isa()->vectors;
    float weight = 1.0f;
    if (shared->gate != NULL) {
        weight = vectors->dot(x, shared->gate, shared->hidden);
        vectors->sigmoids(&weight, 1);
    }
    return om_mlp_add(shared->mlp, x, 1, &weight, out);
}
