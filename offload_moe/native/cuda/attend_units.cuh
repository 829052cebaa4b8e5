/* What a thread block of attention computes at a time: a unit, some heads that share the keys of one section of one row. */
#ifndef OM_ATTEND_UNITS_CUH
#define OM_ATTEND_UNITS_CUH

#include "softmax.cuh"
#include "view.cuh"

/* HEADS of a group of query heads that share keys are a unit; TILE of them are multiplied with a key together. */
template <int N, int M, int DIM, int MORE, int VALUES, int HEADS> struct attend_unit_of {
    static constexpr int NUM_HEADS = N, NUM_KV_HEADS = M, GROUP = N / M, NUM_HEADS_OF_UNIT = HEADS, PARTS = OM_CARD_UP(GROUP, HEADS);
    static constexpr int KEY_DIMS = DIM, MORE_DIMS = MORE, WIDTH = DIM + MORE, VALUE_DIMS = VALUES;
    static constexpr int TILE = HEADS <= 4 ? HEADS : OM_CARD_UP(HEADS, 2), TILES = OM_CARD_UP(HEADS, TILE);
    static constexpr int WARPS = OM_ATTEND_THREADS / 32;
    static constexpr int WARPS_OF_HEAD = HEADS > 4 ? 1 : HEADS > 2 ? 2 : HEADS > 1 ? 4 : 8;
    /* Features of a thread while values are added up, threads for all features, tiles of 64 tokens at once. */
    static constexpr int VECTOR = HEADS > 4 || VALUES < 128 ? 2 : 4, ACROSS = VALUES / VECTOR;
    static constexpr int AT_ONCE = OM_CARD_LEAST(8, OM_ATTEND_THREADS / ACROSS);
    static constexpr int OWNED = AT_ONCE == 1 ? HEADS * VECTOR : OM_CARD_UP(HEADS * VALUES, OM_ATTEND_THREADS); /* sums of a thread */
    static constexpr int QUERY_FLOATS = HEADS * WIDTH, PART_FLOATS = AT_ONCE == 1 ? 0 : AT_ONCE * HEADS * VALUES;
    /* Queries are not read any more when sums of values are written. */
    static constexpr int FLOATS = HEADS * OM_CARD_SECTION + (QUERY_FLOATS > PART_FLOATS ? QUERY_FLOATS : PART_FLOATS);
    static_assert(N % M == 0 && DIM % 16 == 0 && MORE % 16 == 0 && VALUES % 16 == 0 && ACROSS <= OM_ATTEND_THREADS && HEADS <= 8,
                  "no attention of such sizes");
};

/* The same number of heads, 8 at most, in each unit of a group. */
#define OM_ATTEND_HEADS(group) OM_CARD_UP(group, OM_CARD_UP(group, 8))

#define OM_ATTENDED_ROWS 8

/* Rows of one sequence are neighbours in the order of units, so that they find keys in the L2 cache. */
struct attended_rows {
    seen_tokens seen[OM_ATTENDED_ROWS];
    void *const *pages[OM_ATTENDED_ROWS]; /* with the base, they distinguish sequences */
    int bases[OM_ATTENDED_ROWS];
    int num_sharing[OM_ATTENDED_ROWS];  /* rows of one sequence that begin here; 0: the row belongs to one before it */
    int num_sections[OM_ATTENDED_ROWS]; /* of the longest of these */
    int num_units, next_unit;           /* of this block */
};

/* By as many threads as there are rows. */
OM_DEVICE void load_row(const om_card_view &view, int t, attended_rows &rows) {
    rows.seen[t] = tokens_seen(view, t);
    rows.pages[t] = view.rooms[t].key_pages, rows.bases[t] = view.rooms[t].base;
}

/* By one thread. */
OM_DEVICE void find_sequences(int num_rows, attended_rows &rows) {
    int first = 0;
    for (int t = 0; t < num_rows; t++) {
        const int num_sections = sections_of(rows.seen[t]);
        if (t > 0 && rows.pages[t - 1] == rows.pages[t] && rows.bases[t - 1] == rows.bases[t]) {
            rows.num_sharing[t] = 0, rows.num_sharing[first]++;
            if (num_sections > rows.num_sections[first]) rows.num_sections[first] = num_sections;
        } else {
            first = t;
            rows.num_sharing[t] = 1, rows.num_sections[t] = num_sections;
        }
    }
}

/* Of sections times rows; each has as many units as heads have parts. */
OM_DEVICE int sections_of_rows(const attended_rows &rows, int num_rows) {
    int count = 0;
    for (int t = 0; t < num_rows; t++) count += rows.num_sharing[t] * (rows.num_sharing[t] ? rows.num_sections[t] : 0);
    return count;
}

struct attend_unit {
    int row; /* -1: there is none */
    int section, kv_head, first_head, num_heads; /* heads of the row from first_head on */
    int first_token, in_page, count; /* of the section, in_page: in its first page; count <= 0: the row does not have it */
};

template <class U> OM_DEVICE void find_unit(const attended_rows &rows, int index, attend_unit &u) {
    int first = 0;
    constexpr int PER_SECTION = U::NUM_KV_HEADS * U::PARTS;
    for (;; first++) {
        const int units = rows.num_sharing[first] ? rows.num_sharing[first] * rows.num_sections[first] * PER_SECTION : 0;
        if (index < units) break;
        index -= units;
    }
    const int row = first + index % rows.num_sharing[first];
    index /= rows.num_sharing[first];
    const int in_group = index % U::PARTS * U::NUM_HEADS_OF_UNIT, kv_head = index / U::PARTS % U::NUM_KV_HEADS;
    const int section = index / PER_SECTION, first_token = rows.seen[row].first + section * OM_CARD_SECTION;
    u.row = row, u.section = section, u.kv_head = kv_head;
    u.first_head = kv_head * U::GROUP + in_group, u.num_heads = OM_CARD_LEAST(U::NUM_HEADS_OF_UNIT, U::GROUP - in_group);
    u.first_token = first_token, u.in_page = first_token % OM_CARD_PAGE;
    u.count = OM_CARD_LEAST(OM_CARD_SECTION, rows.seen[row].count - section * OM_CARD_SECTION);
}

/* The next one of this block, by one thread. */
template <class U> OM_DEVICE void take_unit(attended_rows &rows, attend_unit &u) {
    const int index = rows.next_unit;
    rows.next_unit += gridDim.x;
    if (index < rows.num_units) find_unit<U>(rows, index, u);
    else u.row = -1;
}

#define OM_SECTION_PAGES (OM_CARD_SECTION / OM_CARD_PAGE + 1)

/* The pages of a section, from the head on. */
struct section_pages {
    const u16 *keys[OM_SECTION_PAGES], *values[OM_SECTION_PAGES];
};

/* By threads 0 to 2 * OM_SECTION_PAGES. */
OM_DEVICE void find_pages(const om_card_room &room, const attend_unit &u, section_pages &pages) {
    const int first = u.first_token / OM_CARD_PAGE, last = (u.first_token + u.count - 1) / OM_CARD_PAGE;
    const int thread = thread_of_now(), n = thread % OM_SECTION_PAGES, page = first + n;
    if (thread >= 2 * OM_SECTION_PAGES || page > last) return;
    if (thread < OM_SECTION_PAGES) pages.keys[n] = (const u16 *)room.key_pages[page] + u.kv_head * room.key_stride;
    else pages.values[n] = (const u16 *)room.value_pages[page] + u.kv_head * room.value_stride;
}

/* A token of the section. */
template <int DIMS> OM_DEVICE const u16 *row_in(const u16 *const *pages, const attend_unit &u, int token) {
    const u32 at = (u32)u.in_page + token;
    return pages[at / OM_CARD_PAGE] + at % OM_CARD_PAGE * DIMS;
}

/* Whether COUNT tokens from `token` on are in one page. */
template <int COUNT> OM_DEVICE bool are_in_page(const attend_unit &u, int token) {
    return COUNT == 1 || ((u32)u.in_page + token) % OM_CARD_PAGE <= OM_CARD_PAGE - COUNT;
}

#endif
