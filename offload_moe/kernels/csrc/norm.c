/* RMS norms. */
#include "job.h"

#include <math.h>

#define PARTS 16 /* partial sums, so that the compiler can vectorize */

/* result[i] = values[i] / sqrt(mean of squares + epsilon) * weight[i]; `result` may be `values`. */
OM_EXPORT void om_rms_norm(const float *values, const float *weight, int64_t length, float epsilon, float *result) {
    float parts[PARTS] = {0}, sum = 0.0f;
    int64_t i = 0;
    for (; i + PARTS <= length; i += PARTS)
        for (int j = 0; j < PARTS; j++) parts[j] += values[i + j] * values[i + j];
    for (; i < length; i++) sum += values[i] * values[i];
    for (int j = 0; j < PARTS; j++) sum += parts[j];
    const float scale = 1.0f / sqrtf(sum / (float)length + epsilon);
    for (i = 0; i < length; i++) result[i] = values[i] * scale * weight[i];
}
