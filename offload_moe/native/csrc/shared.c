/* A shared expert of one token: added to the result of the routed experts, scaled by the sigmoid of its gate if it has one. */
#include "float_mode.h"
#include "job.h"
#include "vector_set.h"

static float share_of(const om_shared *shared, const float *x) {
    if (shared->gate == NULL) return 1.0f;
    const om_vector_set *vectors = om_active_isa()->vectors;
    const uint64_t callers_mode = om_enter_float_mode();
    float share = vectors->dot(x, shared->gate, shared->hidden);
    vectors->sigmoids(&share, 1);
    om_restore_float_mode(callers_mode);
    return share;
}

/* out[H] += expert(x[H]) * gate. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_add_shared(const om_shared *shared, const float *x, float *out) {
    static const int32_t offsets[] = {0, 1}, token = 0;
    const float weight = share_of(shared, x);
    return om_moe_forward(shared->expert, x, 1, OM_F32, &shared->record, offsets, &token, NULL, &weight, 1, out, OM_F32, 1);
}
