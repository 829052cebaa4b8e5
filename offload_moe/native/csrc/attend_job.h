/* Attention of one token over a cache, as a part of a call (`attend.c`). */
#ifndef OM_ATTEND_JOB_H
#define OM_ATTEND_JOB_H

#include "job.h"
#include "vector_set.h"

/* The caller sets all up to `sinks` before it is laid out. */
typedef struct {
    om_cached cached;     /* rows of the first key/value head; those of two heads are `capacity` rows apart */
    const float *queries; /* [num_heads, dim + more_dim] */
    const float *sinks;   /* [num_heads] or NULL */
    int64_t num_heads, num_kv_heads, capacity, length;
    int64_t num_sections, heads_per_unit;
    om_section *sections; /* [num_heads, num_sections] */
    float *sums;          /* [num_heads, num_sections, value_dim] */
    float *room;          /* per thread */
} om_attend_job;

void om_lay_out_attend(om_attend_job *job, uintptr_t *cursor);
void om_run_sections(om_attend_job *job);
/* out[value_dim], once the sections are done. */
void om_merge_head(const om_attend_job *job, int64_t head, float *out);

/* rows[row] = values[dim], rounded to bf16 or as they are. */
void om_write_row(int is_bf16, const float *values, int64_t dim, void *rows, int64_t row);

#endif
