/* RMS norms and layer norms. */
#include "float_mode.h"
#include "job.h"
#include "vector_set.h"

#define ROWS_PER_UNIT 16

typedef struct {
    const float *values, *weight, *bias;
    int64_t num_rows, length;
    float epsilon;
    float *result;
} norm_job;

void om_norm_rows(const float *values, const float *weight, int64_t num_rows, int64_t length, float epsilon, float *result) {
    for (int64_t row = 0; row < num_rows; row++)
        om_active_isa()->vectors->rms_norm(values + row * length, weight, length, epsilon, result + row * length);
}

static void norm_some(const norm_job *job, int64_t first, int64_t num_rows) {
    const int64_t length = job->length;
    const float *values = job->values + first * length;
    float *result = job->result + first * length;
    if (job->bias == NULL) {
        om_norm_rows(values, job->weight, num_rows, length, job->epsilon, result);
        return;
    }
    for (int64_t at = 0; at < num_rows * length; at += length)
        om_active_isa()->vectors->layer_norm(values + at, job->weight, job->bias, length, job->epsilon, result + at);
}

static void rows_unit(void *context, int64_t unit, int64_t next, int thread) {
    (void)next, (void)thread;
    const norm_job *job = context;
    const int64_t first = unit * ROWS_PER_UNIT;
    norm_some(job, first, om_min(ROWS_PER_UNIT, job->num_rows - first));
}

/* result[T, i] = values[T, i] / sqrt(mean of squares of the row + epsilon) * weight[i]; `result` may be `values`. With a bias
 * the row's mean is subtracted first, and bias[i] is added. */
OM_EXPORT void om_norm(const float *values, const float *weight, const float *bias, int64_t num_rows, int64_t length, float epsilon,
                       float *result) {
    norm_job job = {values, weight, bias, num_rows, length, epsilon, result};
    if (num_rows > OM_MAX_ROWS) {
        om_pool_begin();
        om_pool_run(rows_unit, &job, om_divide_up(num_rows, ROWS_PER_UNIT));
        om_pool_end();
        return;
    }
    const uint64_t callers_mode = om_enter_float_mode();
    norm_some(&job, 0, num_rows);
    om_restore_float_mode(callers_mode);
}
