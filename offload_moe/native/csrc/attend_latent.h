/* Latent attention of one token: all heads share the latents. Included once per instruction set, after `attend.h`. */
#define OM_LATENT_HEADS OM_LATENT_ROOM /* whose sums stay in registers beside each other */
#define OM_LATENT_TOKENS 2             /* likewise, where scores are made */

/* scores[h * length + t] += q[h] . keys[t], or = where `adds` is 0; the counts are constants, so that sums stay in registers. */
OM_INLINE void latent_scores(const float *q, int64_t q_stride, const float *keys, int64_t dim, const int num_heads,
                             const int num_tokens, int64_t length, const int adds, float *scores) {
    fvec sums[OM_LATENT_HEADS][OM_LATENT_TOKENS];
    for (int h = 0; h < num_heads; h++)
        for (int t = 0; t < num_tokens; t++) sums[h][t] = fv_zero();
    for (int64_t i = 0; i < dim; i += OM_LANES)
        for (int t = 0; t < num_tokens; t++) {
            const fvec key = fv_load(keys + t * dim + i);
            for (int h = 0; h < num_heads; h++) sums[h][t] = fv_fma(fv_load(q + h * q_stride + i), key, sums[h][t]);
        }
    for (int h = 0; h < num_heads; h++)
        for (int t = 0; t < num_tokens; t++) {
            const float sum = fv_sum(sums[h][t]);
            scores[h * length + t] = adds ? scores[h * length + t] + sum : sum;
        }
}

OM_INLINE void latent_scores_of(const float *q, int64_t q_stride, const float *keys, int64_t dim, const int num_heads,
                                int64_t length, const int adds, float *scores) {
    int64_t t = 0;
    for (; t + OM_LATENT_TOKENS <= length; t += OM_LATENT_TOKENS)
        latent_scores(q, q_stride, keys + t * dim, dim, num_heads, OM_LATENT_TOKENS, length, adds, scores + t);
    for (; t < length; t++) latent_scores(q, q_stride, keys + t * dim, dim, num_heads, 1, length, adds, scores + t);
}

/* out[h][0 .. count * OM_LANES) = sum over t of shares[h * length + t] * latents[t]; out is `rank` apart. */
OM_INLINE void latent_mix(const float *shares, const float *latents, int64_t rank, int64_t length, const int num_heads,
                          const int count, float *out) {
    fvec sums[OM_LATENT_HEADS][OM_MIXED];
    for (int h = 0; h < num_heads; h++)
        for (int i = 0; i < count; i++) sums[h][i] = fv_zero();
    for (int64_t t = 0; t < length; t++) {
        fvec part[OM_MIXED];
        for (int i = 0; i < count; i++) part[i] = fv_load(latents + t * rank + i * OM_LANES);
        for (int h = 0; h < num_heads; h++) {
            const fvec share = fv_broadcast(shares[h * length + t]);
            for (int i = 0; i < count; i++) sums[h][i] = fv_fma(share, part[i], sums[h][i]);
        }
    }
    for (int h = 0; h < num_heads; h++)
        for (int i = 0; i < count; i++) fv_store(out + h * rank + i * OM_LANES, sums[h][i]);
}

OM_INLINE void latent_heads(const om_latent_view *view, const float *inner, const float *turned, const int num_heads,
                            float *scores, float *out) {
    const int64_t length = view->length, rank = view->rank;
    latent_scores_of(inner, rank, view->latents, rank, num_heads, length, 0, scores);
    latent_scores_of(turned, view->turned_stride, view->rotated, view->rotated_dims, num_heads, length, 1, scores);
    for (int64_t i = 0; i < num_heads * length; i++) scores[i] *= view->scaling;
    for (int h = 0; h < num_heads; h++) attend_softmax(scores + h * length, length, NULL);
    int64_t first = 0;
    for (; first + OM_MIXED * OM_LANES <= rank; first += OM_MIXED * OM_LANES)
        latent_mix(scores, view->latents + first, rank, length, num_heads, OM_MIXED, out + first);
    for (; first < rank; first += OM_LANES) latent_mix(scores, view->latents + first, rank, length, num_heads, 1, out + first);
}

/* inner [num_heads, rank]: queries in the latent space; turned: their rotated parts; scores: room for
 * OM_LATENT_HEADS * length; out [num_heads, rank]: means of latents. */
static void attend_latent(const om_latent_view *view, const float *inner, const float *turned, int64_t num_heads, float *scores,
                          float *out) {
    int64_t h = 0;
    for (; h + OM_LATENT_HEADS <= num_heads; h += OM_LATENT_HEADS)
        latent_heads(view, inner + h * view->rank, turned + h * view->turned_stride, OM_LATENT_HEADS, scores, out + h * view->rank);
    for (; h < num_heads; h++)
        latent_heads(view, inner + h * view->rank, turned + h * view->turned_stride, 1, scores, out + h * view->rank);
}
