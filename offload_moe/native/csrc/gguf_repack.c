/* Matrices of GGUF's types between the order of a file and panels, in place; exact both ways. */
#include "gguf_types.h"
#include "job.h"
#include "panel.h"

#include <string.h>

#define MOST_RUNS 18

/* Bytes of a chunk in a file that are neighbours in a panel, too: so many 16-bit halves of dwords. */
typedef struct {
    uint8_t start, halves;
} run;

typedef struct {
    run runs[MOST_RUNS]; /* in the order of the panel's dwords; `halves` is 0 behind the last */
    uint8_t sides[OM_SIDE_BYTES];
} order;

static const order ORDERS[] = {
    [OM_Q4_0] = {.runs = {{0, 1}, {18, 1}, {2, 8}, {20, 8}}},
    [OM_Q4_1] = {.runs = {{0, 2}, {20, 2}, {4, 8}, {24, 8}}},
    [OM_Q5_0] = {.runs = {{0, 1}, {22, 1}, {2, 2}, {24, 2}, {6, 8}, {28, 8}}},
    [OM_Q5_1] = {.runs = {{0, 2}, {24, 2}, {4, 2}, {28, 2}, {8, 8}, {32, 8}}},
    [OM_Q8_0] = {.runs = {{0, 1}, {34, 1}, {2, 16}, {36, 16}}},
    [OM_IQ4_NL] = {.runs = {{0, 1}, {18, 1}, {2, 8}, {20, 8}}},
    [OM_GGUF_MXFP4] = {.runs = {{1, 8}, {18, 8}}, .sides = {0, 17}},
    [OM_Q2_K] = {.runs = {{80, 2}, {0, 40}}},
    [OM_Q4_K] = {.runs = {{0, 72}}},
    [OM_IQ4_XS] = {.runs = {{0, 68}}},
    [OM_Q3_K] = {.runs = {{96, 6}, {0, 2}, {32, 2}, {4, 2}, {36, 2}, {8, 2}, {40, 2}, {12, 2}, {44, 2}, {16, 2}, {48, 2}, {20, 2},
                          {52, 2}, {24, 2}, {56, 2}, {28, 2}, {60, 2}, {64, 16}},
                 .sides = {108, 109}},
    [OM_Q5_K] = {.runs = {{0, 8}, {16, 2}, {48, 2}, {20, 2}, {52, 2}, {24, 2}, {56, 2}, {28, 2}, {60, 2}, {32, 2}, {64, 2}, {36, 2},
                          {68, 2}, {40, 2}, {72, 2}, {44, 2}, {76, 2}, {80, 48}}},
    [OM_Q6_K] = {.sides = {208, 209}}, /* more runs than fit: `find_halves` */
};

/* The places in a file of the halves of a chunk's dwords. */
static void find_halves(int codec, uint8_t *places) {
    if (codec != OM_Q6_K) {
        for (const run *r = ORDERS[codec].runs; r < ORDERS[codec].runs + MOST_RUNS && r->halves; r++)
            for (int i = 0; i < r->halves; i++) *places++ = (uint8_t)(r->start + 2 * i);
        return;
    }
    for (int i = 0; i < 8; i++) *places++ = (uint8_t)(192 + 2 * i);
    for (int v = 0; v < 16; v++) { /* low bits of columns v and v + 32 of a half, high bits of both */
        const int low = v / 8 * 64 + v % 8 * 4;
        const int starts[3] = {low, low + 32, 128 + v * 4};
        for (int i = 0; i < 6; i++) *places++ = (uint8_t)(starts[i / 2] + 2 * (i % 2));
    }
}

void om_gguf_collect(int codec, const uint8_t *dwords, const uint8_t *sides, int num_rows, uint8_t *bytes) {
    uint8_t places[2 * OM_MOST_DWORDS];
    find_halves(codec, places);
    for (int i = 0; i < 2 * om_chunk_dwords(codec); i++)
        memcpy(bytes + places[i], dwords + i / 2 * num_rows * 4 + i % 2 * 2, 2);
    if (om_has_sides(codec))
        for (int i = 0; i < OM_SIDE_BYTES; i++) bytes[ORDERS[codec].sides[i]] = sides[i];
}

/* A panel of `num_rows` rows in the file's order -> its dwords and sides. */
OM_INLINE void spread(const int num_rows, int codec, int64_t num_chunks, const uint8_t *places, const uint8_t *rows, uint8_t *dwords,
                      uint8_t *sides) {
    const int count = om_chunk_dwords(codec), chunk_bytes = om_chunk_bytes(codec);
    for (int64_t k = 0; k < num_chunks; k++, dwords += count * num_rows * 4)
        for (int r = 0; r < num_rows; r++) {
            const uint8_t *from = rows + (r * num_chunks + k) * chunk_bytes;
            uint8_t *to = dwords + r * 4;
            for (int i = 0; i < count; i++, to += num_rows * 4) {
                uint16_t halves[2];
                memcpy(halves, from + places[2 * i], 2);
                memcpy(halves + 1, from + places[2 * i + 1], 2);
                memcpy(to, halves, 4);
            }
            if (om_has_sides(codec))
                for (int i = 0; i < OM_SIDE_BYTES; i++) *sides++ = from[ORDERS[codec].sides[i]];
        }
}

static void panels_from_rows(const om_matrix *m, uint8_t *record, uint8_t *scratch) {
    const int64_t num_chunks = om_num_chunks(m), file_bytes = num_chunks * om_chunk_bytes(m->codec);
    const int64_t code_bytes = num_chunks * om_chunk_dwords(m->codec) * 4, side_bytes = num_chunks * OM_SIDE_BYTES;
    uint8_t places[2 * OM_MOST_DWORDS], *sides = scratch + OM_PANEL * file_bytes;
    find_halves(m->codec, places);
    for (int64_t row = 0; row < m->rows; row += OM_PANEL) {
        const int num_rows = (int)om_min(OM_PANEL, m->rows - row);
        memcpy(scratch, record + m->codes + row * file_bytes, (size_t)(num_rows * file_bytes));
        uint8_t *to = record + m->codes + row * code_bytes;
        if (num_rows == OM_PANEL)
            spread(OM_PANEL, m->codec, num_chunks, places, scratch, to, sides + row * side_bytes);
        else
            spread(num_rows, m->codec, num_chunks, places, scratch, to, sides + row * side_bytes);
    }
    if (om_has_sides(m->codec)) memcpy(record + m->scales, sides, (size_t)(m->rows * side_bytes));
}

static void rows_from_panels(const om_matrix *m, uint8_t *record, uint8_t *scratch) {
    const int64_t num_chunks = om_num_chunks(m), file_bytes = num_chunks * om_chunk_bytes(m->codec);
    const int64_t dwords = om_chunk_dwords(m->codec), code_bytes = num_chunks * dwords * 4, side_bytes = num_chunks * OM_SIDE_BYTES;
    uint8_t *sides = scratch + OM_PANEL * file_bytes;
    if (om_has_sides(m->codec)) memcpy(sides, record + m->scales, (size_t)(m->rows * side_bytes));
    for (int64_t row = (m->rows - 1) / OM_PANEL * OM_PANEL; row >= 0; row -= OM_PANEL) {
        const int num_rows = (int)om_min(OM_PANEL, m->rows - row);
        memcpy(scratch, record + m->codes + row * code_bytes, (size_t)(num_rows * code_bytes));
        for (int r = 0; r < num_rows; r++)
            for (int64_t k = 0; k < num_chunks; k++)
                om_gguf_collect(m->codec, scratch + (k * dwords * num_rows + r) * 4,
                                sides + row * side_bytes + (k * num_rows + r) * OM_SIDE_BYTES, num_rows,
                                record + m->codes + (row + r) * file_bytes + k * om_chunk_bytes(m->codec));
    }
}

/* `scratch` holds 16 rows in the file's order, and the sides of the matrix. */
void om_repack_gguf(const om_matrix *m, uint8_t *record, int32_t to_panels, uint8_t *scratch) {
    if (to_panels)
        panels_from_rows(m, record, scratch);
    else
        rows_from_panels(m, record, scratch);
}
