/* The portable C of attention, by itself: what a pass of the CPU computes, one row at a time, over tokens that lie in order. */
#include "vector_portable.c"
#include "rotary.c"

static void norm_heads(float *heads, const float *norm, int64_t norm_length, float epsilon, int64_t count) {
    for (int64_t at = 0; norm != NULL && at < count; at += norm_length)
        rms_norm(heads + at, norm, norm_length, epsilon, heads + at);
}

/* heads[num_heads, dim]: bias, norm over norm_length at a time, rotation of the first dims, as `finish_heads` in attention.c. */
OM_EXPORT void finish_heads(float *heads, const float *bias, const float *norm, int64_t norm_length, float epsilon, const float *cos,
                            const float *signed_sin, int64_t num_heads, int64_t dim, int64_t rotated_dims, int64_t rotation,
                            int64_t is_normed_rotated) {
    om_add_bias(heads, bias, num_heads * dim);
    if (!is_normed_rotated) norm_heads(heads, norm, norm_length, epsilon, num_heads * dim);
    for (int64_t at = 0; at < num_heads * dim; at += dim) om_rotate(heads + at, cos, signed_sin, rotated_dims, (int)rotation);
    if (is_normed_rotated) norm_heads(heads, norm, norm_length, epsilon, num_heads * dim);
}

/* As `query_scale` in attention.c. */
OM_EXPORT void scale_queries(float *values, int64_t count, int64_t position, float step, float strength) {
    const float steps = floorf((float)(position + 1) / step), scale = strength * om_log(steps + 1.0f) + 1.0f;
    for (int64_t i = 0; i < count; i++) values[i] *= scale;
}

OM_EXPORT void multiply_by_gates(float *values, float *gates, int64_t count) {
    sigmoids(gates, count);
    for (int64_t i = 0; i < count; i++) values[i] *= gates[i];
}

OM_EXPORT void round_to_bf16(const float *values, int64_t count, uint16_t *rounded) {
    for (int64_t i = 0; i < count; i++) rounded[i] = om_float_to_bf16(values[i]);
}

/* out[N, value_dim]. keys [M, count, dim], more_keys [count, more_dim] or NULL, values [M, count, value_dim]; room: 512 floats. */
OM_EXPORT void attend_to(const float *q, const uint16_t *keys, const uint16_t *more_keys, const uint16_t *values, int64_t num_heads,
                         int64_t num_kv_heads, int64_t count, int64_t dim, int64_t more_dim, int64_t value_dim, float scaling,
                         const float *sinks, om_section *sections, float *sums, float *out) {
    const int64_t num_sections = (count + OM_SECTION - 1) / OM_SECTION;
    float room[OM_SECTION];
    for (int64_t head = 0; head < num_heads; head++) {
        const int64_t first = head / (num_heads / num_kv_heads) * count;
        for (int64_t s = 0; s < num_sections; s++) {
            const int64_t row = first + s * OM_SECTION, left = count - s * OM_SECTION;
            const om_cached cached = {.keys = keys + row * dim, .more_keys = more_keys == NULL ? NULL : more_keys + row * more_dim,
                                      .values = values + row * value_dim, .dim = dim, .more_dim = more_dim, .value_dim = value_dim,
                                      .scaling = scaling, .is_bf16 = 1};
            const int64_t seen = left < OM_SECTION ? left : OM_SECTION;
            attend(&cached, q + head * (dim + more_dim), 1, &seen, room, sections + s, sums + s * value_dim, num_sections);
        }
        merge_sections(sections, sums, num_sections, value_dim, sinks == NULL ? NULL : sinks + head, out + head * value_dim);
    }
}

/* out[num_rows] = rows of plain numbers times x[cols]. */
OM_EXPORT void multiply(const void *rows, int is_bf16, int64_t first_row, int64_t num_rows, int64_t cols, const float *x, float *out) {
    const om_weights weights = {.codes = rows, .cols = cols};
    const om_tile tile = {.values = {x}, .num_tokens = 1};
    float results[OM_TILE];
    for (int64_t r = 0; r < num_rows; r++) {
        value_rows(is_bf16 ? OM_BF16 : OM_FP32, &weights, first_row + r, 1, &tile, results);
        out[r] = results[0];
    }
}

OM_EXPORT void quantize_group(const float *values, int64_t count, int8_t *quants, float *scale) {
    om_quantize_group(values, (int)count, quants, scale);
}
