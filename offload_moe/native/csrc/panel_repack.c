/* Records between row order and panels: each plane of a matrix is transposed, panel by panel, in place; exact both ways. */
#include "gguf_types.h"
#include "job.h"
#include "panel.h"

/* Elements of `size` bytes: [num_rows, count] of row order to [count, num_rows] of a panel, or back. */
OM_INLINE void transpose_as(const int size, const int64_t num_rows, const int32_t to_panels, const uint8_t *from, uint8_t *to,
                            int64_t count) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t r = 0; r < num_rows; r++) {
            const int64_t in_row = (r * count + i) * size, in_panel = (i * num_rows + r) * size;
            __builtin_memcpy(to + (to_panels ? in_panel : in_row), from + (to_panels ? in_row : in_panel), size);
        }
}

OM_INLINE void transpose_sized(const int size, int64_t num_rows, int32_t to_panels, const uint8_t *from, uint8_t *to,
                               int64_t count) {
    if (num_rows != OM_PANEL)
        transpose_as(size, num_rows, to_panels, from, to, count);
    else if (to_panels)
        transpose_as(size, OM_PANEL, 1, from, to, count);
    else
        transpose_as(size, OM_PANEL, 0, from, to, count);
}

static void transpose(int64_t size, int64_t num_rows, int32_t to_panels, const uint8_t *from, uint8_t *to, int64_t count) {
    if (size == 4)
        transpose_sized(4, num_rows, to_panels, from, to, count);
    else
        transpose_sized(1, num_rows, to_panels, from, to, count);
}

/* A plane with `row_bytes` in each row, elements of `size` bytes; `scratch` holds a panel of it. */
static void repack_plane(const om_matrix *m, uint8_t *plane, int64_t row_bytes, int64_t size, int32_t to_panels, uint8_t *scratch) {
    for (int64_t part = 0; part < m->rows; part += m->part_rows)
        for (int64_t row = part, end = part + m->part_rows; row < end; row += OM_PANEL) {
            const int64_t num_rows = om_min(OM_PANEL, end - row);
            uint8_t *panel = plane + row * row_bytes;
            transpose(size, num_rows, to_panels, panel, scratch, row_bytes / size);
            __builtin_memcpy(panel, scratch, (size_t)(num_rows * row_bytes));
        }
}

/* A record's matrices from row order to panels of their `part_rows`, or back. `scratch` holds 16 rows of codes of the widest; for
 * GGUF's types see `om_repack_gguf`. */
OM_EXPORT void om_repack(const om_matrix *matrices, int64_t num_matrices, uint8_t *record, int32_t to_panels, uint8_t *scratch) {
    for (int64_t i = 0; i < num_matrices; i++) {
        const om_matrix *m = &matrices[i];
        if (OM_ARE_VALUES(m->codec)) continue; /* they stay in row order */
        if (OM_IS_GGUF(m->codec)) {
            om_repack_gguf(m, record, to_panels, scratch);
            continue;
        }
        const int64_t scale_bytes = OM_SCALE_BYTES(m->codec);
        repack_plane(m, record + m->codes, m->codec == OM_INT8 ? m->padded : m->padded / 2, 4, to_panels, scratch);
        repack_plane(m, record + m->scales, m->padded / OM_BLOCK * OM_GROUPS(m->codec) * scale_bytes, scale_bytes, to_panels, scratch);
    }
}
