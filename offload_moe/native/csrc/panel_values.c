#include "panel_values.h"

#define ROWS_AT_ONCE 64

void om_value_panels(const om_weights *w, int64_t first_row, int64_t num_rows, const om_panel_tile *tile, float *results,
                     int64_t stride) {
    const om_rows_fn rows = om_rows_of(w->codec);
    om_tile values = {.num_tokens = tile->num_tokens};
    float some[ROWS_AT_ONCE * OM_TILE];
    for (int t = 0; t < tile->num_tokens; t++) values.values[t] = tile->values[t];
    for (int64_t first = 0; first < num_rows; first += ROWS_AT_ONCE) {
        const int64_t count = num_rows - first < ROWS_AT_ONCE ? num_rows - first : ROWS_AT_ONCE;
        rows(w, first_row + first, count, &values, some);
        for (int t = 0; t < tile->num_tokens; t++)
            for (int64_t r = 0; r < count; r++) results[t * stride + first + r] = some[r * OM_TILE + t];
    }
}
