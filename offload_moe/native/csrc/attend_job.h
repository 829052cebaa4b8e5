/* Attention of some tokens, each over a cache, as a part of a call: `attend.c`, or of many, `attend_blocks.c`. */
#ifndef OM_ATTEND_JOB_H
#define OM_ATTEND_JOB_H

#include "job.h"
#include "vector_set.h"

/* One of few tokens. */
typedef struct {
    int64_t num_sections, heads_per_unit;
    om_section *sections; /* [num_heads, num_sections] */
    float *sums;          /* [num_heads, num_sections, value_dim] */
} om_attend_row;

/* Tokens that follow each other in one sequence, and see positions from the same one on, are a block. */
typedef struct {
    int64_t heads_per_unit, rows_per_unit, num_sections; /* at most */
    int64_t num_blocks, *first_rows;                     /* [num_blocks + 1] */
    uint8_t *scratch;                                    /* per thread */
    int64_t scratch_bytes;
    int is_split;         /* each section is a unit; the results of all are here: */
    om_section *sections; /* [num_kv_heads, parts of heads, num_rows, heads_per_unit, num_sections] */
    float *sums;          /* the same, [value_dim] each */
} om_attend_blocks;

/* The caller sets all up to `num_kv_heads` before it is laid out, but for `queries` and `out`. */
typedef struct {
    om_cached cached;     /* of a row: `om_cached_of` */
    const om_room *rooms; /* [num_rows] */
    const float *sinks;   /* [num_heads] or NULL */
    int64_t num_rows, num_heads, num_kv_heads;
    const float *queries; /* [num_rows, num_heads, dim + more_dim] */
    float *out;           /* [num_rows, num_heads, value_dim] */
    int is_in_blocks;     /* from `om_lay_out_attend` on */
    om_attend_row rows[OM_MAX_ROWS];
    om_attend_blocks blocks;
    float *room;          /* per thread, where they are not in blocks */
} om_attend;

void om_lay_out_attend(om_attend *attend, uintptr_t *cursor);
void om_run_attend(om_attend *attend);
/* Sets `out` of one head of a row, where rows are not in blocks: `om_run_attend` leaves that to the caller. */
void om_merge_head(const om_attend *attend, int64_t row, int64_t head);

OM_INLINE int64_t om_heads_per_group(const om_attend *attend) { return attend->num_heads / attend->num_kv_heads; }

/* What a key/value head has of a room, from a position on. */
om_cached om_cached_of(const om_attend *attend, const om_room *room, int64_t kv_head, int64_t position);

/* How many sequences the rows are of, as far as they follow each other. */
int64_t om_sequences_of(const om_attend *attend);
void om_lay_out_blocks(om_attend *attend, uintptr_t *cursor);
void om_run_blocks(om_attend *attend);

/* rows[row] = values[dim], rounded to bf16 or as they are. */
void om_write_row(int is_bf16, const float *values, int64_t dim, void *rows, int64_t row);

#endif
