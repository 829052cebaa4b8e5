/* What a set of vectors computes; included once per instruction set, after its primitives. */

/* Rows of bf16 or fp32; of fp16 as of bf16. */
OM_INLINE const void *row_at(const int is_bf16, const void *rows, int64_t at) {
    return (const char *)rows + at * (is_bf16 ? 2 : 4);
}

OM_INLINE vec load_row(const int is_bf16, const void *rows, int64_t at) {
    return is_bf16 ? vec_load_bf16((const uint16_t *)rows + at) : vec_load((const float *)rows + at);
}

OM_INLINE void prefetch_rows(const void *rows, int64_t num_bytes) {
    for (int64_t at = 0; at < num_bytes; at += 64) OM_PREFETCH((const char *)rows + at);
}

#include "sums.h"
#include "attend.h"
#include "value_rows.h"
#include "delta.h"

#define OM_VECTOR_TABLE {{bf16_rows, fp32_rows, fp16_rows}, attend, merge_sections, dot, rms_norm, layer_norm, exponentials, sigmoids, \
                         delta_heads}
