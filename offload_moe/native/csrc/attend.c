/* Attention of some tokens, each over a cache, as a part of a call: in units of a section of positions and heads that share its rows. */
#include "attend_job.h"

#define HEADS_PER_UNIT 16 /* so that their queries and scores stay in the L2 cache */

static int64_t group_of(const om_attend_job *job) { return job->num_heads / job->num_kv_heads; }
static int64_t units_of_group(const om_attend_job *job) { return om_divide_up(group_of(job), job->heads_per_unit); }
static int64_t units_of(const om_attend_job *job) { return job->num_kv_heads * job->num_sections * units_of_group(job); }

static void lay_out_row(om_attend_job *job, uintptr_t *cursor) {
    const int64_t value_bytes = job->cached.value_dim * (int64_t)sizeof(float), num_threads = om_pool_threads();
    job->num_sections = om_divide_up(job->length, OM_SECTION);
    /* heads that share rows are computed together where that leaves work for every thread */
    const int64_t parts = om_divide_up(num_threads, job->num_kv_heads * job->num_sections);
    job->heads_per_unit = om_min(HEADS_PER_UNIT, om_divide_up(group_of(job), parts));
    job->sections = om_take(cursor, job->num_heads * job->num_sections * (int64_t)sizeof(om_section));
    job->sums = om_take(cursor, job->num_heads * job->num_sections * value_bytes);
    job->room = om_take(cursor, num_threads * job->heads_per_unit * OM_SECTION * (int64_t)sizeof(float));
}

void om_lay_out_attend(om_attend_rows *attend, uintptr_t *cursor) {
    for (int64_t t = 0; t < attend->num_rows; t++) lay_out_row(&attend->rows[t], cursor);
}

static const void *skip(const om_attend_job *job, const void *rows, int64_t num_rows, int64_t dim) {
    return rows == NULL ? NULL : (const char *)rows + num_rows * dim * (job->cached.is_bf16 ? 2 : 4);
}

static void section_unit(void *context, int64_t unit, int64_t next, int thread) {
    (void)next;
    const om_attend_job *job = ((const om_attend_rows *)context)->rows;
    for (int64_t units; unit >= (units = units_of(job)); job++) unit -= units;
    const int64_t parts = units_of_group(job), first_head = unit % parts * job->heads_per_unit;
    const int64_t section = unit / parts % job->num_sections, kv_head = unit / parts / job->num_sections;
    const int64_t count = om_min(job->heads_per_unit, group_of(job) - first_head), head = kv_head * group_of(job) + first_head;
    const int64_t row = kv_head * job->capacity + section * OM_SECTION, at = head * job->num_sections + section;
    om_cached cached = job->cached;
    cached.keys = skip(job, cached.keys, row, cached.dim);
    cached.more_keys = skip(job, cached.more_keys, row, cached.more_dim);
    cached.values = skip(job, cached.values, row, cached.value_dim);
    om_active_isa()->vectors->attend(&cached, job->queries + head * (cached.dim + cached.more_dim), count,
                                     om_min(OM_SECTION, job->length - section * OM_SECTION),
                                     job->room + thread * job->heads_per_unit * OM_SECTION, job->sections + at,
                                     job->sums + at * cached.value_dim, job->num_sections);
}

void om_run_sections(om_attend_rows *attend) {
    int64_t num_units = 0;
    for (int64_t t = 0; t < attend->num_rows; t++) num_units += units_of(&attend->rows[t]);
    om_pool_run(section_unit, attend, num_units);
}

/* The sections of one head -> out[value_dim]. */
void om_merge_head(const om_attend_job *job, int64_t head, float *out) {
    const int64_t at = head * job->num_sections, dim = job->cached.value_dim;
    om_active_isa()->vectors->merge(job->sections + at, job->sums + at * dim, job->num_sections, dim,
                                    job->sinks == NULL ? NULL : job->sinks + head, out);
}

void om_write_row(int is_bf16, const float *values, int64_t dim, void *rows, int64_t row) {
    if (is_bf16)
        for (int64_t i = 0; i < dim; i++) ((uint16_t *)rows)[row * dim + i] = om_float_to_bf16(values[i]);
    else
        __builtin_memcpy((float *)rows + row * dim, values, (size_t)dim * sizeof(float));
}
