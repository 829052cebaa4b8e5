/* RMS norms. */
#include "float_mode.h"
#include "job.h"
#include "vector_set.h"

#define ROWS_PER_UNIT 16

typedef struct {
    const float *values, *weight;
    int64_t num_rows, length;
    float epsilon;
    float *result;
} norm_job;

void om_norm_rows(const float *values, const float *weight, int64_t num_rows, int64_t length, float epsilon, float *result) {
    for (int64_t row = 0; row < num_rows; row++)
        om_active_isa()->vectors->rms_norm(values + row * length, weight, length, epsilon, result + row * length);
}

static void rows_unit(void *context, int64_t unit, int64_t next, int thread) {
    (void)next, (void)thread;
    const norm_job *job = context;
    const int64_t first = unit * ROWS_PER_UNIT, at = first * job->length;
    om_norm_rows(job->values + at, job->weight, om_min(ROWS_PER_UNIT, job->num_rows - first), job->length, job->epsilon,
                 job->result + at);
}

/* result[T, i] = values[T, i] / sqrt(mean of squares of the row + epsilon) * weight[i]; `result` may be `values`. */
OM_EXPORT void om_rms_norm(const float *values, const float *weight, int64_t num_rows, int64_t length, float epsilon,
                           float *result) {
    if (num_rows > OM_MAX_ROWS) {
        norm_job job = {values, weight, num_rows, length, epsilon, result};
        om_pool_begin();
        om_pool_run(rows_unit, &job, om_divide_up(num_rows, ROWS_PER_UNIT));
        om_pool_end();
        return;
    }
    const uint64_t callers_mode = om_enter_float_mode();
    om_norm_rows(values, weight, num_rows, length, epsilon, result);
    om_restore_float_mode(callers_mode);
}
