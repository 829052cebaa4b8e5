/* Gated delta rules. Included once per instruction set, by `vector_loops.h`. Dims are multiples of 16. */

/* One head: its state [key_dim, value_dim] fades, gives what it holds for the key, takes up so much of the difference from the
 * value, and is read by the query. */
typedef struct {
    const float *query, *key;
    int64_t key_dim, value_dim;
    float fading, strength;
} delta_head;

/* W vectors of each row of the state; each row is read and written twice. from: the state before, which may be `state`. */
OM_INLINE void delta_columns(const int W, const delta_head *head, const float *from, float *state, const float *value, float *out) {
    const vec fading = vec_broadcast(head->fading), negative = vec_broadcast(-1.0f);
    vec sums[4], change[4];
    OM_UNROLL for (int w = 0; w < W; w++) sums[w] = vec_broadcast(0.0f);
    for (int64_t i = 0; i < head->key_dim; i++) {
        float *row = state + i * head->value_dim;
        const vec key = vec_broadcast(head->key[i]);
        OM_UNROLL for (int w = 0; w < W; w++) {
            const vec faded = vec_mul(vec_load(from + i * head->value_dim + w * OM_LANES), fading);
            vec_store(row + w * OM_LANES, faded);
            sums[w] = vec_fma(faded, key, sums[w]);
        }
    }
    OM_UNROLL for (int w = 0; w < W; w++) {
        change[w] = vec_mul(vec_fma(sums[w], negative, vec_load(value + w * OM_LANES)), vec_broadcast(head->strength));
        sums[w] = vec_broadcast(0.0f);
    }
    for (int64_t i = 0; i < head->key_dim; i++) {
        float *row = state + i * head->value_dim;
        const vec key = vec_broadcast(head->key[i]), query = vec_broadcast(head->query[i]);
        OM_UNROLL for (int w = 0; w < W; w++) {
            const vec changed = vec_fma(change[w], key, vec_load(row + w * OM_LANES));
            vec_store(row + w * OM_LANES, changed);
            sums[w] = vec_fma(changed, query, sums[w]);
        }
    }
    OM_UNROLL for (int w = 0; w < W; w++) vec_store(out + w * OM_LANES, sums[w]);
}

static void delta_rule(const delta_head *head, const float *from, float *state, const float *value, float *out) {
    int64_t at = 0;
    for (; at + 4 * OM_LANES <= head->value_dim; at += 4 * OM_LANES) delta_columns(4, head, from + at, state + at, value + at, out + at);
    for (; at < head->value_dim; at += OM_LANES) delta_columns(1, head, from + at, state + at, value + at, out + at);
}

/* log(1 + exp(x)), x itself beyond 20 as torch has it. Kahan's correction of 1 + y. */
OM_INLINE float softplus(float x) {
    if (x > 20.0f) return x;
    const float y = om_exp(x), u = 1.0f + y;
    return u == 1.0f ? y : om_log(u) * (y / (u - 1.0f));
}

/* The windows of some channels move on by an input each. */
static void convolve(const om_delta *layer, const om_delta_states *states, int64_t first, const float *from, int64_t count, float *to) {
    const int64_t length = layer->conv_length;
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = (first + i) * length;
        const float *before = states->inputs + at, *weight = layer->conv_weight + at;
        float *window = states->next_inputs + at, sum = layer->conv_bias == NULL ? 0.0f : layer->conv_bias[first + i];
        for (int64_t t = 0; t + 1 < length; t++) {
            window[t] = before[t + 1];
            sum = om_fma(weight[t], window[t], sum);
        }
        window[length - 1] = from[i];
        to[i] = om_fma(weight[length - 1], from[i], sum);
    }
    for (int64_t i = 0; i < count; i++) to[i] = om_over(to[i], to[i]);
}

static void normalize(float *values, int64_t dim, float scaling) {
    const float scale = scaling / sqrtf(dot(values, values, dim) + 1e-6f);
    for (int64_t i = 0; i < dim; i++) values[i] *= scale;
}

/* A head of keys, and the heads of values that share it. */
static void delta_heads(const om_delta *layer, const om_delta_inputs *from, int64_t g, const om_delta_states *states, float *out) {
    const int64_t K = layer->key_dim, V = layer->value_dim, shared = layer->num_heads / layer->num_key_heads;
    const int64_t keys = layer->num_key_heads * K;
    float query[OM_MAX_DELTA_DIM], key[OM_MAX_DELTA_DIM], value[OM_MAX_DELTA_DIM];
    convolve(layer, states, g * K, from->queries + g * from->strides[0], K, query);
    convolve(layer, states, keys + g * K, from->keys + g * from->strides[0], K, key);
    normalize(query, K, 1.0f / sqrtf((float)K));
    normalize(key, K, 1.0f);
    for (int64_t s = 0; s < shared; s++) {
        const int64_t h = g * shared + s, at = g * from->strides[3] + s;
        const float *gate = from->gates + g * from->strides[2] + s * V;
        const float time = softplus(from->times[at] + layer->time_biases[h]);
        const delta_head head = {query, key, K, V, om_exp(layer->decays[h] * time), om_over(1.0f, from->strengths[at])};
        convolve(layer, states, 2 * keys + h * V, from->values + g * from->strides[1] + s * V, V, value);
        delta_rule(&head, states->state + h * K * V, states->next_state + h * K * V, value, out + h * V);
        rms_norm(out + h * V, layer->norm, V, layer->epsilon, out + h * V);
        for (int64_t i = 0; i < V; i++) out[h * V + i] *= om_over(gate[i], gate[i]);
    }
}
