/* Attention of some tokens, each over a cache, as a part of a call (`attend.c`). */
#ifndef OM_ATTEND_JOB_H
#define OM_ATTEND_JOB_H

#include "job.h"
#include "vector_set.h"

/* One token. The caller sets all up to `length` before it is laid out. */
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

typedef struct {
    om_attend_job rows[OM_MAX_ROWS];
    int64_t num_rows;
} om_attend_rows;

void om_lay_out_attend(om_attend_rows *attend, uintptr_t *cursor);
void om_run_sections(om_attend_rows *attend);
/* out[value_dim] of a row, once the sections are done. */
void om_merge_head(const om_attend_job *row, int64_t head, float *out);

/* rows[row] = values[dim], rounded to bf16 or as they are. */
void om_write_row(int is_bf16, const float *values, int64_t dim, void *rows, int64_t row);

#endif
