/* RMS norms. */
#include "job.h"

#include <math.h>

/* result[i] = values[i] / sqrt(mean of squares + epsilon) * weight[i]; `result` may be `values`. */
OM_EXPORT void om_rms_norm(const float *values, const float *weight, int64_t length, float epsilon, float *result) {
    const float scale = 1.0f / sqrtf(om_dot(values, values, length) / (float)length + epsilon);
    for (int64_t i = 0; i < length; i++) result[i] = values[i] * scale * weight[i];
}
