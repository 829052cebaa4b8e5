/* Attention of one token over rows of a cache. Included once per instruction set, by `vector_loops.h`. */
#define OM_TILE_ROWS 64        /* whose weighed values are added up by themselves */
#define OM_ROWS_CACHED 16      /* rows of keys that stay in the L1 cache while all heads use them */

/* sums[h * R + r] += q[h] . rows[r]; H and R are constants, so that sums stay in registers. */
OM_INLINE void add_products(const int is_bf16, const int H, const int R, const float *q, int64_t width, const void *rows,
                            int64_t dim, vec *sums) {
    for (int64_t i = 0; i < dim; i += OM_LANES)
        OM_UNROLL for (int r = 0; r < R; r++) {
            const vec row = load_row(is_bf16, rows, r * dim + i);
            OM_UNROLL for (int h = 0; h < H; h++) sums[h * R + r] = vec_fma(vec_load(q + h * width + i), row, sums[h * R + r]);
        }
}

/* Unscaled scores[h * OM_SECTION + r] of rows from `at` on. */
OM_INLINE void score_rows(const int is_bf16, const int H, const int R, const om_cached *c, const float *q, int64_t at,
                          float *scores) {
    const int64_t width = c->dim + c->more_dim;
    vec sums[OM_HEADS * 4];
    float results[OM_HEADS * 4];
    OM_UNROLL for (int n = 0; n < H * R; n++) sums[n] = vec_broadcast(0.0f);
    add_products(is_bf16, H, R, q, width, row_at(is_bf16, c->keys, at * c->dim), c->dim, sums);
    if (c->more_dim > 0)
        add_products(is_bf16, H, R, q + c->dim, width, row_at(is_bf16, c->more_keys, at * c->more_dim), c->more_dim, sums);
    OM_UNROLL for (int n = 0; n + 4 <= H * R; n += 4) vec_sums(sums + n, results + n);
    OM_UNROLL for (int n = H * R / 4 * 4; n < H * R; n++) results[n] = vec_sum(sums[n]);
    OM_UNROLL for (int h = 0; h < H; h++)
        OM_UNROLL for (int r = 0; r < R; r++) scores[h * OM_SECTION + at + r] = results[h * R + r];
}

/* `ahead`: NULL, or what is prefetched meanwhile, as many bytes for each row as it has. */
OM_INLINE void score_heads(const int is_bf16, const int H, const om_cached *c, const float *q, int64_t first, int64_t end,
                           const char *ahead, float *scores) {
    const int64_t row_bytes = c->dim * (is_bf16 ? 2 : 4);
    const int R = OM_AT_ONCE(H);
    for (; first + R <= end; first += R) {
        if (ahead != NULL) prefetch_rows(ahead + first * row_bytes, R * row_bytes);
        score_rows(is_bf16, H, R, c, q, first, scores);
    }
    for (; first < end; first++) score_rows(is_bf16, H, 1, c, q, first, scores);
}

OM_INLINE void score_section(const int is_bf16, const om_cached *c, const float *q, int64_t num_heads, int64_t count,
                             float *scores) {
    const int64_t width = c->dim + c->more_dim;
    for (int64_t first = 0; first < count; first += OM_ROWS_CACHED) {
        const int64_t end = first + OM_ROWS_CACHED < count ? first + OM_ROWS_CACHED : count;
        const char *ahead = (const char *)c->keys + OM_PREFETCH_BYTES;
        int64_t h = 0;
        if (OM_HEADS >= 4)
            for (; h + 4 <= num_heads; h += 4, ahead = NULL)
                score_heads(is_bf16, 4, c, q + h * width, first, end, ahead, scores + h * OM_SECTION);
        if (OM_HEADS >= 2)
            for (; h + 2 <= num_heads; h += 2, ahead = NULL)
                score_heads(is_bf16, 2, c, q + h * width, first, end, ahead, scores + h * OM_SECTION);
        for (; h < num_heads; h++, ahead = NULL)
            score_heads(is_bf16, 1, c, q + h * width, first, end, ahead, scores + h * OM_SECTION);
    }
}

/* sums[h * stride + i ..] += those of a tile: W vectors of its rows' values from `i` on, weighed. ahead: bytes, or 0. */
OM_INLINE void weigh_tile(const int is_bf16, const int H, const int W, const void *values, int64_t dim, int64_t count,
                          int64_t ahead, const float *weights, float *sums, int64_t stride) {
    vec tile[OM_HEADS * 4];
    OM_UNROLL for (int n = 0; n < H * W; n++) tile[n] = vec_broadcast(0.0f);
    for (int64_t s = 0; s < count; s++) {
        const void *row = row_at(is_bf16, values, s * dim);
        vec value[4];
        if (ahead) prefetch_rows((const char *)row + ahead, W * OM_LANES * (is_bf16 ? 2 : 4));
        OM_UNROLL for (int w = 0; w < W; w++) value[w] = load_row(is_bf16, row, w * OM_LANES);
        OM_UNROLL for (int h = 0; h < H; h++) {
            const vec weight = vec_broadcast(weights[h * OM_SECTION + s]);
            OM_UNROLL for (int w = 0; w < W; w++) tile[h * W + w] = vec_fma(weight, value[w], tile[h * W + w]);
        }
    }
    OM_UNROLL for (int h = 0; h < H; h++)
        OM_UNROLL for (int w = 0; w < W; w++) {
            float *sum = sums + h * stride + w * OM_LANES;
            vec_store(sum, vec_add(vec_load(sum), tile[h * W + w]));
        }
}

/* All features of a tile. */
OM_INLINE void weigh_heads(const int is_bf16, const int H, const void *values, int64_t dim, int64_t count, int64_t ahead,
                           const float *weights, float *sums, int64_t stride) {
    const int W = OM_AT_ONCE(H);
    int64_t i = 0;
    for (; i + W * OM_LANES <= dim; i += W * OM_LANES)
        weigh_tile(is_bf16, H, W, row_at(is_bf16, values, i), dim, count, ahead, weights, sums + i, stride);
    for (; i < dim; i += OM_LANES)
        weigh_tile(is_bf16, H, 1, row_at(is_bf16, values, i), dim, count, ahead, weights, sums + i, stride);
}

OM_INLINE void weigh_section(const int is_bf16, const om_cached *c, const float *weights, int64_t num_heads, int64_t count,
                             float *sums, int64_t stride) {
    const int64_t dim = c->value_dim, tile_bytes = OM_TILE_ROWS * dim * (is_bf16 ? 2 : 4);
    for (int64_t h = 0; h < num_heads; h++)
        for (int64_t i = 0; i < dim; i++) sums[h * stride + i] = 0.0f;
    for (int64_t first = 0; first < count; first += OM_TILE_ROWS) {
        const int64_t rows = first + OM_TILE_ROWS < count ? OM_TILE_ROWS : count - first;
        const void *values = row_at(is_bf16, c->values, first * dim);
        const float *of_tile = weights + first;
        int64_t h = 0;
        if (OM_HEADS >= 4)
            for (; h + 4 <= num_heads; h += 4)
                weigh_heads(is_bf16, 4, values, dim, rows, h ? 0 : tile_bytes, of_tile + h * OM_SECTION, sums + h * stride, stride);
        if (OM_HEADS >= 2)
            for (; h + 2 <= num_heads; h += 2)
                weigh_heads(is_bf16, 2, values, dim, rows, h ? 0 : tile_bytes, of_tile + h * OM_SECTION, sums + h * stride, stride);
        for (; h < num_heads; h++)
            weigh_heads(is_bf16, 1, values, dim, rows, h ? 0 : tile_bytes, of_tile + h * OM_SECTION, sums + h * stride, stride);
    }
}

OM_INLINE void attend_as(const int is_bf16, const om_cached *c, const float *q, int64_t num_heads, int64_t count, float *room,
                         om_section *sections, float *sums, int64_t stride) {
    score_section(is_bf16, c, q, num_heads, count, room);
    for (int64_t h = 0; h < num_heads; h++) {
        float *scores = room + h * OM_SECTION;
        for (int64_t s = 0; s < count; s++) scores[s] *= c->scaling;
        const float greatest = greatest_of(scores, count);
        sections[h * stride] = (om_section){greatest, take_exponentials(greatest, scores, count)};
    }
    weigh_section(is_bf16, c, room, num_heads, count, sums, stride * c->value_dim);
}

static void attend(const om_cached *c, const float *q, int64_t num_heads, int64_t count, float *room, om_section *sections,
                   float *sums, int64_t stride) {
    if (c->is_bf16)
        attend_as(1, c, q, num_heads, count, room, sections, sums, stride);
    else
        attend_as(0, c, q, num_heads, count, room, sections, sums, stride);
}

static void merge_sections(const om_section *sections, const float *sums, int64_t num_sections, int64_t dim, const float *sink,
                           float *out) {
    float greatest = sink != NULL ? *sink : -INFINITY, total = 0.0f;
    for (int64_t s = 0; s < num_sections; s++) greatest = sections[s].greatest > greatest ? sections[s].greatest : greatest;
    for (int64_t i = 0; i < dim; i++) out[i] = 0.0f;
    for (int64_t s = 0; s < num_sections; s++) {
        const float factor = om_exp(sections[s].greatest - greatest);
        total = om_fma(factor, sections[s].sum, total);
        for (int64_t i = 0; i < dim; i += OM_LANES)
            vec_store(out + i, vec_fma(vec_broadcast(factor), vec_load(sums + s * dim + i), vec_load(out + i)));
    }
    if (sink != NULL) total += om_exp(*sink - greatest);
    const vec share = vec_broadcast(1.0f / total);
    for (int64_t i = 0; i < dim; i += OM_LANES) vec_store(out + i, vec_mul(vec_load(out + i), share));
}
