/* Rows of an embedding. */
#include "float_mode.h"
#include "om_kernels.h"

OM_APART static void scale_row(const void *table, int32_t codec, int64_t first, int64_t hidden, float scale, float *x) {
    const float *numbers = table;
    const uint16_t *halves = table;
    for (int64_t i = 0; i < hidden; i++) x[i] = scale * (codec == OM_FP32 ? numbers[first + i] : om_bf16_to_float(halves[first + i]));
}

/* x[count, H] = scale * table[ids]; table[num_rows, H] in fp32 or bf16. Returns -1 where an id is none of its rows. */
OM_EXPORT int om_embed(const void *table, int32_t codec, int64_t num_rows, int64_t hidden, const int64_t *ids, int64_t count,
                       float scale, float *x) {
    const uint64_t callers_mode = om_enter_float_mode();
    int64_t row = 0;
    for (; row < count && ids[row] >= 0 && ids[row] < num_rows; row++)
        scale_row(table, codec, ids[row] * hidden, hidden, scale, x + row * hidden);
    om_restore_float_mode(callers_mode);
    return row == count ? 0 : -1;
}
