/* Attention of queries over the rows of a cache that they share: heads of one token, or of several. Included once per instruction
 * set, by `vector_loops.h`. */
#define OM_TILE_ROWS 64        /* whose weighed values are added up by themselves */
#define OM_ROWS_CACHED 16      /* rows of keys that stay in the L1 cache while all queries use them */

OM_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

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

OM_INLINE void score_section(const int is_bf16, const om_cached *c, const float *q, int64_t num_queries, const int64_t *counts,
                             float *scores) {
    const int64_t width = c->dim + c->more_dim, count = counts[num_queries - 1];
    for (int64_t first = 0; first < count; first += OM_ROWS_CACHED) {
        const int64_t end = first + OM_ROWS_CACHED;
        const char *ahead = (const char *)c->keys + OM_PREFETCH_BYTES;
        int64_t h = 0;
        if (OM_HEADS >= 4)
            for (; h + 4 <= num_queries; h += 4, ahead = NULL)
                score_heads(is_bf16, 4, c, q + h * width, first, lesser(end, counts[h + 3]), ahead, scores + h * OM_SECTION);
        if (OM_HEADS >= 2)
            for (; h + 2 <= num_queries; h += 2, ahead = NULL)
                score_heads(is_bf16, 2, c, q + h * width, first, lesser(end, counts[h + 1]), ahead, scores + h * OM_SECTION);
        for (; h < num_queries; h++, ahead = NULL)
            score_heads(is_bf16, 1, c, q + h * width, first, lesser(end, counts[h]), ahead, scores + h * OM_SECTION);
    }
}

/* sums[h * stride + i ..] += those of a tile: W vectors of its rows' values from `i` on, weighed. Query h sees counts[h] of the
 * rows, no fewer than the query before it. ahead: bytes, or 0. */
OM_INLINE void weigh_tile(const int is_bf16, const int H, const int W, const void *values, int64_t dim, const int64_t *counts,
                          int64_t ahead, const float *weights, float *sums, int64_t stride) {
    vec tile[OM_HEADS * 4];
    OM_UNROLL for (int n = 0; n < H * W; n++) tile[n] = vec_broadcast(0.0f);
    for (int64_t s = 0; s < counts[0]; s++) {
        const void *row = row_at(is_bf16, values, s * dim);
        vec value[4];
        if (ahead) prefetch_rows((const char *)row + ahead, W * OM_LANES * (is_bf16 ? 2 : 4));
        OM_UNROLL for (int w = 0; w < W; w++) value[w] = load_row(is_bf16, row, w * OM_LANES);
        OM_UNROLL for (int h = 0; h < H; h++) {
            const vec weight = vec_broadcast(weights[h * OM_SECTION + s]);
            OM_UNROLL for (int w = 0; w < W; w++) tile[h * W + w] = vec_fma(weight, value[w], tile[h * W + w]);
        }
    }
    OM_UNROLL for (int h = 1; h < H; h++)
        for (int64_t s = counts[0]; s < counts[h]; s++) {
            const void *row = row_at(is_bf16, values, s * dim);
            const vec weight = vec_broadcast(weights[h * OM_SECTION + s]);
            OM_UNROLL for (int w = 0; w < W; w++)
                tile[h * W + w] = vec_fma(weight, load_row(is_bf16, row, w * OM_LANES), tile[h * W + w]);
        }
    OM_UNROLL for (int h = 0; h < H; h++)
        OM_UNROLL for (int w = 0; w < W; w++) {
            float *sum = sums + h * stride + w * OM_LANES;
            vec_store(sum, vec_add(vec_load(sum), tile[h * W + w]));
        }
}

/* All features of a tile whose first row is number `first` of the section. */
OM_INLINE void weigh_heads(const int is_bf16, const int H, const om_cached *c, int64_t first, const int64_t *counts, int64_t ahead,
                           const float *weights, float *sums, int64_t stride) {
    const int W = OM_AT_ONCE(H);
    const void *values = row_at(is_bf16, c->values, first * c->value_dim);
    int64_t of_tile[OM_HEADS], i = 0;
    for (int h = 0; h < H; h++) of_tile[h] = counts[h] < first ? 0 : lesser(OM_TILE_ROWS, counts[h] - first);
    if (of_tile[H - 1] == 0) return;
    for (; i + W * OM_LANES <= c->value_dim; i += W * OM_LANES)
        weigh_tile(is_bf16, H, W, row_at(is_bf16, values, i), c->value_dim, of_tile, ahead, weights + first, sums + i, stride);
    for (; i < c->value_dim; i += OM_LANES)
        weigh_tile(is_bf16, H, 1, row_at(is_bf16, values, i), c->value_dim, of_tile, ahead, weights + first, sums + i, stride);
}

OM_INLINE void weigh_section(const int is_bf16, const om_cached *c, const float *weights, int64_t num_queries, const int64_t *counts,
                             float *sums, int64_t stride) {
    const int64_t count = counts[num_queries - 1], tile_bytes = OM_TILE_ROWS * c->value_dim * (is_bf16 ? 2 : 4);
    for (int64_t h = 0; h < num_queries; h++)
        for (int64_t i = 0; i < c->value_dim; i++) sums[h * stride + i] = 0.0f;
    for (int64_t first = 0; first < count; first += OM_TILE_ROWS) {
        int64_t h = 0, ahead = tile_bytes;
        if (OM_HEADS >= 4)
            for (; h + 4 <= num_queries; h += 4, ahead = 0)
                weigh_heads(is_bf16, 4, c, first, counts + h, ahead, weights + h * OM_SECTION, sums + h * stride, stride);
        if (OM_HEADS >= 2)
            for (; h + 2 <= num_queries; h += 2, ahead = 0)
                weigh_heads(is_bf16, 2, c, first, counts + h, ahead, weights + h * OM_SECTION, sums + h * stride, stride);
        for (; h < num_queries; h++, ahead = 0)
            weigh_heads(is_bf16, 1, c, first, counts + h, ahead, weights + h * OM_SECTION, sums + h * stride, stride);
    }
}

OM_INLINE void attend_as(const int is_bf16, const om_cached *c, const float *q, int64_t num_queries, const int64_t *counts,
                         float *room, om_section *sections, float *sums, int64_t stride) {
    score_section(is_bf16, c, q, num_queries, counts, room);
    for (int64_t h = 0; h < num_queries; h++) {
        float *scores = room + h * OM_SECTION;
        for (int64_t s = 0; s < counts[h]; s++) scores[s] *= c->scaling;
        const float greatest = greatest_of(scores, counts[h]);
        sections[h * stride] = (om_section){greatest, take_exponentials(greatest, scores, counts[h])};
    }
    weigh_section(is_bf16, c, room, num_queries, counts, sums, stride * c->value_dim);
}

static void attend(const om_cached *c, const float *q, int64_t num_queries, const int64_t *counts, float *room,
                   om_section *sections, float *sums, int64_t stride) {
    if (c->is_bf16)
        attend_as(1, c, q, num_queries, counts, room, sections, sums, stride);
    else
        attend_as(0, c, q, num_queries, counts, room, sections, sums, stride);
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
