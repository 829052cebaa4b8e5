/* Attention of one token: query heads that share a key/value head. Included once per instruction set, after `elementwise.h`. */
#define OM_MIXED 4 /* vectors of a mean that stay in registers */

/* scores[s] = q . keys[s]; both have `dim` values, a multiple of OM_LANES. */
OM_INLINE float attend_dot(const float *q, const float *key, int64_t dim) {
    fvec sum = fv_zero();
    for (int64_t i = 0; i < dim; i += OM_LANES) sum = fv_fma(fv_load(q + i), fv_load(key + i), sum);
    return fv_sum(sum);
}

/* Scores to shares, in place; a sink takes part in the sum only. Source: torch's softmax: the greatest is subtracted. */
OM_INLINE void attend_softmax(float *scores, int64_t length, const float *sink) {
    float greatest = sink != NULL ? *sink : scores[0];
    for (int64_t s = 0; s < length; s++) greatest = scores[s] > greatest ? scores[s] : greatest;
    for (int64_t s = 0; s < length; s++) scores[s] = exp_approximate(scores[s] - greatest);
    float sum = sink != NULL ? exp_approximate(*sink - greatest) : 0.0f;
    for (int64_t s = 0; s < length; s++) sum += scores[s];
    const float share = 1.0f / sum;
    for (int64_t s = 0; s < length; s++) scores[s] *= share;
}

/* out[0 .. count * OM_LANES) = sum over s of shares[s] * values[s]; `count` is a constant, so that the sums stay in registers. */
OM_INLINE void attend_mix(const float *shares, const float *values, int64_t dim, int64_t length, const int count, float *out) {
    fvec sums[OM_MIXED];
    for (int i = 0; i < count; i++) sums[i] = fv_zero();
    for (int64_t s = 0; s < length; s++) {
        const fvec share = fv_broadcast(shares[s]);
        for (int i = 0; i < count; i++) sums[i] = fv_fma(share, fv_load(values + s * dim + i * OM_LANES), sums[i]);
    }
    for (int i = 0; i < count; i++) fv_store(out + i * OM_LANES, sums[i]);
}

/* q, out [num_heads, dim]; keys, values [length, dim]; scores: room for num_heads * length; sinks: one per head or NULL. */
static void attend(const float *q, const float *keys, const float *values, const float *sinks, int64_t num_heads, int64_t dim,
                   int64_t length, float scaling, float *scores, float *out) {
    for (int64_t s = 0; s < length; s++)
        for (int64_t h = 0; h < num_heads; h++)
            scores[h * length + s] = scaling * attend_dot(q + h * dim, keys + s * dim, dim);
    for (int64_t h = 0; h < num_heads; h++) {
        float *shares = scores + h * length, *target = out + h * dim;
        attend_softmax(shares, length, sinks == NULL ? NULL : sinks + h);
        int64_t first = 0;
        for (; first + OM_MIXED * OM_LANES <= dim; first += OM_MIXED * OM_LANES)
            attend_mix(shares, values + first, dim, length, OM_MIXED, target + first);
        for (; first < dim; first += OM_LANES) attend_mix(shares, values + first, dim, length, 1, target + first);
    }
}
