/* RMS norms. */
#include "vector_set.h"

/* result[i] = values[i] / sqrt(mean of squares + epsilon) * weight[i]; `result` may be `values`. */
OM_EXPORT void om_rms_norm(const float *values, const float *weight, int64_t length, float epsilon, float *result) {
    om_active_isa()->vectors->rms_norm(values, weight, length, epsilon, result);
}
