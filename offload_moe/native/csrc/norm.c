/* RMS norms. */
#include "float_mode.h"
#include "vector_set.h"

/* result[i] = values[i] / sqrt(mean of squares + epsilon) * weight[i]; `result` may be `values`. */
OM_EXPORT void om_rms_norm(const float *values, const float *weight, int64_t length, float epsilon, float *result) {
    const uint64_t callers_mode = om_enter_float_mode();
    om_active_isa()->vectors->rms_norm(values, weight, length, epsilon, result);
    om_restore_float_mode(callers_mode);
}
