/* Attention of some tokens, each over a cache, as a part of a call: in units of a section of positions and heads that share its rows;
 * of many, and of those that share a cache, in blocks. */
#include "attend_job.h"

#define HEADS_PER_UNIT 16 /* so that their queries and scores stay in the L2 cache */

static int64_t units_of_group(const om_attend *a, int64_t t) {
    return om_divide_up(om_heads_per_group(a), a->rows[t].heads_per_unit);
}
static int64_t units_of(const om_attend *a, int64_t t) {
    return a->num_kv_heads * a->rows[t].num_sections * units_of_group(a, t);
}

static void lay_out_row(om_attend *a, int64_t t, uintptr_t *cursor) {
    om_attend_row *row = a->rows + t;
    row->num_sections = om_divide_up(a->rooms[t].length + 1, OM_SECTION);
    /* heads that share rows are computed together where that leaves work for every thread */
    const int64_t parts = om_divide_up(om_pool_threads(), a->num_kv_heads * row->num_sections);
    const int64_t num_results = a->num_heads * row->num_sections;
    row->heads_per_unit = om_min(HEADS_PER_UNIT, om_divide_up(om_heads_per_group(a), parts));
    row->sections = om_take(cursor, num_results * (int64_t)sizeof(om_section));
    row->sums = om_take(cursor, num_results * a->cached.value_dim * (int64_t)sizeof(float));
}

void om_lay_out_attend(om_attend *a, uintptr_t *cursor) {
    a->is_in_blocks = a->num_rows > OM_MAX_ROWS || om_sequences_of(a) < a->num_rows;
    if (a->is_in_blocks) {
        om_lay_out_blocks(a, cursor);
        return;
    }
    for (int64_t t = 0; t < a->num_rows; t++) lay_out_row(a, t, cursor);
    a->room = om_take(cursor, om_pool_threads() * HEADS_PER_UNIT * OM_SECTION * (int64_t)sizeof(float));
}

static const void *skip(const om_attend *a, const void *rows, int64_t num_rows, int64_t dim) {
    return (const char *)rows + num_rows * dim * (a->cached.is_bf16 ? 2 : 4);
}

/* A room of latents has their rotated keys in place of values: the latents are both. */
om_cached om_cached_of(const om_attend *a, const om_room *room, int64_t kv_head, int64_t position) {
    const int64_t row = kv_head * room->capacity + position;
    om_cached cached = a->cached;
    cached.keys = skip(a, room->keys, row, cached.dim);
    cached.values = cached.more_dim > 0 ? cached.keys : skip(a, room->values, row, cached.value_dim);
    if (cached.more_dim > 0) cached.more_keys = skip(a, room->values, row, cached.more_dim);
    return cached;
}

static void section_unit(void *context, int64_t unit, int64_t next, int thread) {
    (void)next;
    const om_attend *a = context;
    int64_t t = 0, counts[HEADS_PER_UNIT];
    for (int64_t units; unit >= (units = units_of(a, t)); t++) unit -= units;
    const om_attend_row *row = a->rows + t;
    const int64_t parts = units_of_group(a, t), first_head = unit % parts * row->heads_per_unit;
    const int64_t section = unit / parts % row->num_sections, kv_head = unit / parts / row->num_sections;
    const int64_t count = om_min(row->heads_per_unit, om_heads_per_group(a) - first_head);
    const int64_t head = kv_head * om_heads_per_group(a) + first_head, at = head * row->num_sections + section;
    const om_cached cached = om_cached_of(a, a->rooms + t, kv_head, section * OM_SECTION);
    for (int64_t h = 0; h < count; h++) counts[h] = om_min(OM_SECTION, a->rooms[t].length + 1 - section * OM_SECTION);
    om_active_isa()->vectors->attend(&cached, a->queries + (t * a->num_heads + head) * (cached.dim + cached.more_dim), count,
                                     counts, a->room + thread * HEADS_PER_UNIT * OM_SECTION, row->sections + at,
                                     row->sums + at * cached.value_dim, row->num_sections);
}

void om_run_attend(om_attend *a) {
    int64_t num_units = 0;
    if (a->is_in_blocks) {
        om_run_blocks(a);
        return;
    }
    for (int64_t t = 0; t < a->num_rows; t++) num_units += units_of(a, t);
    om_pool_run(section_unit, a, num_units);
}

void om_merge_head(const om_attend *a, int64_t t, int64_t head) {
    const om_attend_row *row = a->rows + t;
    const int64_t at = head * row->num_sections, dim = a->cached.value_dim;
    om_active_isa()->vectors->merge(row->sections + at, row->sums + at * dim, row->num_sections, dim,
                                    a->sinks == NULL ? NULL : a->sinks + head, a->out + (t * a->num_heads + head) * dim);
}

void om_write_row(int is_bf16, const float *values, int64_t dim, void *rows, int64_t row) {
    if (is_bf16)
        for (int64_t i = 0; i < dim; i++) ((uint16_t *)rows)[row * dim + i] = om_float_to_bf16(values[i]);
    else
        __builtin_memcpy((float *)rows + row * dim, values, (size_t)dim * sizeof(float));
}
