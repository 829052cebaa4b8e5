/* Attention of many tokens, or of some of one sequence: in units of tokens that follow each other in one sequence, and
 * heads that share their keys, so that a tile of keys or values is read once for all of them. Where these are fewer than
 * threads, each section of positions is a unit. A token's operations and their order are those of a step alone. */
#include "attend_job.h"

#define QUERIES_PER_UNIT 64      /* heads of tokens */
#define RESULT_BYTES (4ll << 20) /* of a thread's sections, of which long contexts have many */

typedef struct {
    float *queries;       /* [queries, dim + more_dim] */
    float *room;          /* [queries, OM_SECTION] */
    int64_t *counts;      /* [queries]: rows of a section that each sees */
    om_section *sections; /* [queries, sections] */
    float *sums;          /* [queries, sections, value_dim] */
} unit_scratch;

/* Rows first_row ... and heads first_head ...; a query is a head of a row, [rows, heads]. part: of the heads. */
typedef struct {
    int64_t first_row, num_rows, first_head, num_heads, kv_head, part;
} block_unit;

static int64_t units_of_group(const om_attend *a) { return om_divide_up(om_heads_per_group(a), a->blocks.heads_per_unit); }

static void take_results(const om_attend *a, int64_t num_queries, uintptr_t *cursor, om_section **sections, float **sums) {
    num_queries *= a->blocks.num_sections;
    *sections = om_take(cursor, num_queries * (int64_t)sizeof(om_section));
    *sums = om_take(cursor, num_queries * a->cached.value_dim * (int64_t)sizeof(float));
}

static unit_scratch lay_out_scratch(const om_attend *a, uintptr_t cursor, uintptr_t *end) {
    const om_attend_blocks *b = &a->blocks;
    const int64_t num_queries = b->heads_per_unit * b->rows_per_unit, size = sizeof(float);
    unit_scratch scratch = {0};
    scratch.queries = om_take(&cursor, num_queries * (a->cached.dim + a->cached.more_dim) * size);
    scratch.room = om_take(&cursor, num_queries * OM_SECTION * size);
    scratch.counts = om_take(&cursor, num_queries * (int64_t)sizeof(int64_t));
    if (!b->is_split) take_results(a, num_queries, &cursor, &scratch.sections, &scratch.sums);
    if (end != NULL) *end = cursor;
    return scratch;
}

static int follows(const om_room *room, const om_room *before) {
    return room->keys == before->keys && room->values == before->values && room->length == before->length + 1;
}

int64_t om_sequences_of(const om_attend *a) {
    int64_t count = 0;
    for (int64_t t = 0; t < a->num_rows; t++) count += t == 0 || !follows(a->rooms + t, a->rooms + t - 1);
    return count;
}

void om_lay_out_blocks(om_attend *a, uintptr_t *cursor) {
    om_attend_blocks *b = &a->blocks;
    int64_t longest = 0;
    uintptr_t scratch_bytes;
    for (int64_t t = 0; t < a->num_rows; t++) longest = om_max(longest, a->rooms[t].length + 1);
    b->num_sections = om_divide_up(longest, OM_SECTION);
    const int64_t query_bytes = b->num_sections * (a->cached.value_dim * (int64_t)sizeof(float) + (int64_t)sizeof(om_section));
    const int64_t num_queries = om_max(1, om_min(QUERIES_PER_UNIT, RESULT_BYTES / query_bytes));
    const int64_t most_heads = om_min(num_queries, om_heads_per_group(a)), num_sequences = om_sequences_of(a);
    const int64_t least_blocks = om_max(num_sequences, om_divide_up(a->num_rows, num_queries / most_heads));
    b->is_split = b->num_sections > 1 && a->num_kv_heads * least_blocks < om_pool_threads();
    /* heads that share keys are apart only where a thread would have nothing to do */
    const int64_t num_units = a->num_kv_heads * num_sequences * (b->is_split ? b->num_sections : 1);
    const int64_t parts = om_divide_up(om_pool_threads(), num_units);
    b->heads_per_unit = om_min(most_heads, om_divide_up(om_heads_per_group(a), parts));
    b->rows_per_unit = num_queries / b->heads_per_unit;
    b->first_rows = om_take(cursor, (a->num_rows + 1) * (int64_t)sizeof(int64_t));
    lay_out_scratch(a, 0, &scratch_bytes);
    b->scratch_bytes = (int64_t)scratch_bytes;
    b->scratch = om_take(cursor, om_pool_threads() * b->scratch_bytes);
    const int64_t all_queries = a->num_kv_heads * units_of_group(a) * a->num_rows * b->heads_per_unit;
    if (b->is_split) take_results(a, all_queries, cursor, &b->sections, &b->sums);
}

static void find_blocks(om_attend *a) {
    om_attend_blocks *b = &a->blocks;
    b->num_blocks = 0;
    for (int64_t t = 0; t < a->num_rows; t++)
        if (t == 0 || t - b->first_rows[b->num_blocks - 1] == b->rows_per_unit || !follows(a->rooms + t, a->rooms + t - 1))
            b->first_rows[b->num_blocks++] = t;
    b->first_rows[b->num_blocks] = a->num_rows;
}

/* Units that read the same keys follow each other. */
static block_unit find_unit(const om_attend *a, int64_t unit) {
    const om_attend_blocks *b = &a->blocks;
    const int64_t parts = units_of_group(a), part = unit % parts, first = part * b->heads_per_unit;
    const int64_t block = unit / parts % b->num_blocks, kv_head = unit / parts / b->num_blocks;
    return (block_unit){.first_row = b->first_rows[block],
                        .num_rows = b->first_rows[block + 1] - b->first_rows[block],
                        .first_head = kv_head * om_heads_per_group(a) + first,
                        .num_heads = om_min(b->heads_per_unit, om_heads_per_group(a) - first),
                        .kv_head = kv_head,
                        .part = part};
}

static unit_scratch scratch_of(const om_attend *a, const block_unit *unit, int thread) {
    const om_attend_blocks *b = &a->blocks;
    unit_scratch scratch = lay_out_scratch(a, (uintptr_t)(b->scratch + thread * b->scratch_bytes), NULL);
    if (b->is_split) {
        const int64_t first = (unit->kv_head * units_of_group(a) + unit->part) * a->num_rows + unit->first_row;
        scratch.sections = b->sections + first * b->heads_per_unit * b->num_sections;
        scratch.sums = b->sums + first * b->heads_per_unit * b->num_sections * a->cached.value_dim;
    }
    return scratch;
}

static void gather_queries(const om_attend *a, const block_unit *unit, float *queries) {
    const int64_t width = a->cached.dim + a->cached.more_dim, count = unit->num_heads * width;
    for (int64_t r = 0; r < unit->num_rows; r++)
        __builtin_memcpy(queries + r * count, a->queries + ((unit->first_row + r) * a->num_heads + unit->first_head) * width,
                         (size_t)count * sizeof(float));
}

/* Rows whose positions end before the section are left out. */
static void attend_to_section(const om_attend *a, const block_unit *unit, int64_t section, const unit_scratch *scratch) {
    const int64_t begin = section * OM_SECTION, num_sections = a->blocks.num_sections, width = a->cached.dim + a->cached.more_dim;
    const om_room *rooms = a->rooms + unit->first_row;
    const int64_t first = om_max(0, begin - rooms->length) * unit->num_heads, count = unit->num_rows * unit->num_heads - first;
    const om_cached cached = om_cached_of(a, rooms, unit->kv_head, begin);
    for (int64_t q = 0; q < count; q++)
        scratch->counts[q] = om_min(OM_SECTION, rooms[(first + q) / unit->num_heads].length + 1 - begin);
    om_active_isa()->vectors->attend(&cached, scratch->queries + first * width, count, scratch->counts, scratch->room,
                                     scratch->sections + first * num_sections + section,
                                     scratch->sums + (first * num_sections + section) * cached.value_dim, num_sections);
}

static void merge_queries(const om_attend *a, const block_unit *unit, const unit_scratch *scratch) {
    const int64_t most = a->blocks.num_sections, dim = a->cached.value_dim;
    for (int64_t r = 0; r < unit->num_rows; r++)
        for (int64_t h = 0; h < unit->num_heads; h++) {
            const int64_t row = unit->first_row + r, head = unit->first_head + h, at = (r * unit->num_heads + h) * most;
            const int64_t num_sections = om_divide_up(a->rooms[row].length + 1, OM_SECTION);
            om_active_isa()->vectors->merge(scratch->sections + at, scratch->sums + at * dim, num_sections, dim,
                                            a->sinks == NULL ? NULL : a->sinks + head, a->out + (row * a->num_heads + head) * dim);
        }
}

static int64_t sections_of(const om_attend *a, const block_unit *unit) {
    return om_divide_up(a->rooms[unit->first_row + unit->num_rows - 1].length + 1, OM_SECTION);
}

static void attend_unit(void *context, int64_t number, int64_t next, int thread) {
    (void)next;
    const om_attend *a = context;
    const block_unit unit = find_unit(a, number);
    const unit_scratch scratch = scratch_of(a, &unit, thread);
    const int64_t num_sections = sections_of(a, &unit);
    gather_queries(a, &unit, scratch.queries);
    for (int64_t section = 0; section < num_sections; section++) attend_to_section(a, &unit, section, &scratch);
    merge_queries(a, &unit, &scratch);
}

static void section_unit(void *context, int64_t number, int64_t next, int thread) {
    (void)next;
    const om_attend *a = context;
    const int64_t num_sections = a->blocks.num_sections, section = number % num_sections;
    const block_unit unit = find_unit(a, number / num_sections);
    if (section >= sections_of(a, &unit)) return;
    const unit_scratch scratch = scratch_of(a, &unit, thread);
    gather_queries(a, &unit, scratch.queries);
    attend_to_section(a, &unit, section, &scratch);
}

static void merge_unit(void *context, int64_t number, int64_t next, int thread) {
    (void)next;
    const om_attend *a = context;
    const block_unit unit = find_unit(a, number);
    const unit_scratch scratch = scratch_of(a, &unit, thread);
    merge_queries(a, &unit, &scratch);
}

void om_run_blocks(om_attend *a) {
    find_blocks(a);
    const int64_t num_units = a->num_kv_heads * a->blocks.num_blocks * units_of_group(a);
    if (!a->blocks.is_split) {
        om_pool_run(attend_unit, a, num_units);
        return;
    }
    om_pool_run(section_unit, a, num_units * a->blocks.num_sections);
    om_pool_run(merge_unit, a, num_units);
}
