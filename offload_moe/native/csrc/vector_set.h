/* What each instruction set computes in vectors of 16 lanes, with the same bits: docs/decisions/064-one-arithmetic.md. */
#ifndef OM_VECTOR_SET_H
#define OM_VECTOR_SET_H

#include "om_kernels.h"

/* Rows of a cache that queries attend to: keys [dim], beside them more keys [more_dim] or none (0), and values
 * [value_dim], in fp32 or bf16. Dims are multiples of 16. */
typedef struct {
    const void *keys, *more_keys, *values;
    int64_t dim, more_dim, value_dim;
    float scaling;
    int32_t is_bf16;
} om_cached;

#define OM_SECTION 512 /* positions that are attended to by themselves; sections are merged */

typedef struct {
    float greatest, sum; /* of the scores; of the exponentials of their distances from it */
} om_section;

/* Of a gated delta rule: what a token reads, and what it leaves for the next one, which may be the same memory. */
typedef struct {
    const float *inputs, *state;
    float *next_inputs, *next_state;
} om_delta_states;

struct om_vector_set {
    om_rows_fn value_rows[OM_NUM_VALUE_CODECS]; /* of a matrix in bf16, fp32 and fp16 */
    /* One section. q [num_queries, dim + more_dim]; a query sees the first counts[query] rows, which are no fewer than the query
     * before it sees. Results of two queries are `stride` sections apart: `sections`, and `sums` of the values weighed by
     * exponentials. room: for num_queries * OM_SECTION floats. */
    void (*attend)(const om_cached *cached, const float *q, int64_t num_queries, const int64_t *counts, float *room,
                   om_section *sections, float *sums, int64_t stride);
    /* The sections of one head -> out[dim], the mean of values. sink: NULL if it has none. */
    void (*merge)(const om_section *sections, const float *sums, int64_t num_sections, int64_t dim, const float *sink, float *out);
    float (*dot)(const float *a, const float *b, int64_t length);
    void (*rms_norm)(const float *values, const float *weight, int64_t length, float epsilon, float *result);
    void (*layer_norm)(const float *values, const float *weight, const float *bias, int64_t length, float epsilon, float *result);
    /* values[count] -> exponentials of their distances from the greatest; returns their sum. */
    float (*exponentials)(float *values, int64_t count);
    void (*sigmoids)(float *values, int64_t count);
    /* Of a token, the heads of values that share head g of keys: states and out as of `om_delta_step`. */
    void (*delta_heads)(const om_delta *layer, const om_delta_inputs *projected, int64_t g, const om_delta_states *states, float *out);
};

extern const om_vector_set om_vectors_portable;
extern const om_vector_set om_vectors_avx2;
extern const om_vector_set om_vectors_avx512;
extern const om_vector_set om_vectors_neon;

#endif
