/* Rows of plain numbers (bf16, fp32 or fp16) times 1..OM_TILE tokens, in 32 lanes: in 16 each addition would wait for the last. Included once per
 * instruction set, by `vector_loops.h`. Rows are read one after another, and the sums of four rows and tokens added up together. */

OM_INLINE float number_at(const int codec, const void *rows, int64_t at) {
    if (codec == OM_FP32) return ((const float *)rows)[at];
    const uint16_t bits = ((const uint16_t *)rows)[at];
    return codec == OM_BF16 ? om_bf16_to_float(bits) : om_fp16_to_float(bits);
}

OM_INLINE vec load_numbers(const int codec, const void *rows, int64_t at) {
    return codec == OM_FP16 ? vec_load_fp16((const uint16_t *)rows + at) : load_row(codec == OM_BF16, rows, at);
}

OM_INLINE vec load_numbers_some(const int codec, const void *rows, int64_t at, int64_t count) {
    float some[OM_LANES] = {0};
    for (int64_t j = 0; j < count && j < OM_LANES; j++) some[j] = number_at(codec, rows, at + j);
    return vec_load(some);
}

/* sums[t * stride] = 16 lanes of the row times token t; T is a constant. `ahead` is prefetched meanwhile. */
OM_INLINE void dot_row(const int codec, const int T, const void *row, int64_t cols, const void *ahead,
                       const float *const *values, vec *sums, const int stride) {
    vec lanes[4], upper[4];
    int64_t i = 0;
    OM_UNROLL for (int t = 0; t < T; t++) lanes[t] = upper[t] = vec_broadcast(0.0f);
    for (; i + 2 * OM_LANES <= cols; i += 2 * OM_LANES) {
        const vec first = load_numbers(codec, row, i), second = load_numbers(codec, row, i + OM_LANES);
        prefetch_rows(row_at(codec != OM_FP32, ahead, i), codec == OM_FP32 ? 128 : 64);
        OM_UNROLL for (int t = 0; t < T; t++) {
            lanes[t] = vec_fma(vec_load(values[t] + i), first, lanes[t]);
            upper[t] = vec_fma(vec_load(values[t] + i + OM_LANES), second, upper[t]);
        }
    }
    for (int is_upper = 0; i < cols; i += OM_LANES, is_upper = 1) {
        const vec part = load_numbers_some(codec, row, i, cols - i);
        OM_UNROLL for (int t = 0; t < T; t++) {
            vec *sum = is_upper ? upper + t : lanes + t;
            *sum = vec_fma(load_some(values[t] + i, cols - i), part, *sum);
        }
    }
    OM_UNROLL for (int t = 0; t < T; t++) sums[t * stride] = vec_add(lanes[t], upper[t]);
}

/* results[r * OM_TILE + t] */
OM_INLINE void multiply_rows(const int codec, const int T, const om_weights *w, int64_t first_row, int64_t num_rows,
                             const float *const *values, float *results) {
    const int R = 4 / T;
    for (int64_t first = 0; first < num_rows; first += R) {
        const int count = num_rows - first < R ? (int)(num_rows - first) : R;
        vec sums[4];
        float dots[4];
        for (int n = 0; n < 4; n++) sums[n] = vec_broadcast(0.0f);
        for (int r = 0; r < count; r++) {
            const void *row = row_at(codec != OM_FP32, w->codes, (first_row + first + r) * w->cols);
            dot_row(codec, T, row, w->cols, (const char *)row + OM_PREFETCH_BYTES, values, sums + r, R);
        }
        vec_sums(sums, dots);
        for (int r = 0; r < count; r++)
            for (int t = 0; t < T; t++) results[(first + r) * OM_TILE + t] = dots[t * R + r];
    }
}

OM_INLINE void value_rows(const int codec, const om_weights *w, int64_t first_row, int64_t num_rows, const om_tile *tile,
                          float *results) {
    if (tile->num_tokens == 1)
        multiply_rows(codec, 1, w, first_row, num_rows, tile->values, results);
    else if (tile->num_tokens == 2 || OM_HEADS < 4) /* the registers hold the sums of two tokens */
        for (int t = 0; t < tile->num_tokens; t += 2) multiply_rows(codec, 2, w, first_row, num_rows, tile->values + t, results + t);
    else
        for (int t = 0; t < tile->num_tokens; t += 4) multiply_rows(codec, 4, w, first_row, num_rows, tile->values + t, results + t);
}

static void bf16_rows(const om_weights *w, int64_t first_row, int64_t num_rows, const om_tile *tile, float *results) {
    value_rows(OM_BF16, w, first_row, num_rows, tile, results);
}

static void fp32_rows(const om_weights *w, int64_t first_row, int64_t num_rows, const om_tile *tile, float *results) {
    value_rows(OM_FP32, w, first_row, num_rows, tile, results);
}

static void fp16_rows(const om_weights *w, int64_t first_row, int64_t num_rows, const om_tile *tile, float *results) {
    value_rows(OM_FP16, w, first_row, num_rows, tile, results);
}
