/* Rows of an embedding. */
#include "om_kernels.h"

/* x[count, H] = scale * table[ids]; table[num_rows, H] in fp32 or bf16. Returns -1 where an id is none of its rows. */
OM_EXPORT int om_embed(const void *table, int32_t codec, int64_t num_rows, int64_t hidden, const int64_t *ids, int64_t count,
                       float scale, float *x) {
    for (int64_t row = 0; row < count; row++) {
        const int64_t first = ids[row] * hidden;
        if (ids[row] < 0 || ids[row] >= num_rows) return -1;
        for (int64_t i = 0; i < hidden; i++)
            x[row * hidden + i] = scale * (codec == OM_FP32 ? ((const float *)table)[first + i]
                                                            : om_bf16_to_float(((const uint16_t *)table)[first + i]));
    }
    return 0;
}
