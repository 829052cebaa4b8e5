/* Sums of fp32 vectors in 16 lanes: element i is in lane i mod 16. Included once per instruction set, by `vector_loops.h`. */

/* Up to 16 values, then zeros. */
OM_INLINE vec load_some(const float *p, int64_t count) {
    float some[OM_LANES] = {0};
    for (int64_t j = 0; j < count && j < OM_LANES; j++) some[j] = p[j];
    return vec_load(some);
}

static float dot(const float *a, const float *b, int64_t length) {
    vec sum = vec_broadcast(0.0f);
    int64_t i = 0;
    for (; i + OM_LANES <= length; i += OM_LANES) sum = vec_fma(vec_load(a + i), vec_load(b + i), sum);
    if (i < length) sum = vec_fma(load_some(a + i, length - i), load_some(b + i, length - i), sum);
    return vec_sum(sum);
}

OM_INLINE float sum_of(const float *values, int64_t count) {
    vec sum = vec_broadcast(0.0f);
    int64_t i = 0;
    for (; i + OM_LANES <= count; i += OM_LANES) sum = vec_add(sum, vec_load(values + i));
    if (i < count) sum = vec_add(sum, load_some(values + i, count - i));
    return vec_sum(sum);
}

/* `result` may be `values`. */
static void rms_norm(const float *values, const float *weight, int64_t length, float epsilon, float *result) {
    const float scale = 1.0f / sqrtf(dot(values, values, length) / (float)length + epsilon);
    for (int64_t i = 0; i < length; i++) result[i] = values[i] * scale * weight[i];
}

/* The RMS norm of the distances from the mean, and a bias. `result` may be `values`. */
static void layer_norm(const float *values, const float *weight, const float *bias, int64_t length, float epsilon, float *result) {
    const float mean = sum_of(values, length) / (float)length;
    for (int64_t i = 0; i < length; i++) result[i] = values[i] - mean;
    rms_norm(result, weight, length, epsilon, result);
    for (int64_t i = 0; i < length; i++) result[i] += bias[i];
}

OM_INLINE float greatest_of(const float *values, int64_t count) {
    vec most = vec_broadcast(-INFINITY);
    float lanes[OM_LANES], greatest = -INFINITY;
    int64_t i = 0;
    for (; i + OM_LANES <= count; i += OM_LANES) most = vec_greater(vec_load(values + i), most);
    vec_store(lanes, most);
    for (int j = 0; j < OM_LANES; j++) greatest = lanes[j] > greatest ? lanes[j] : greatest;
    for (; i < count; i++) greatest = values[i] > greatest ? values[i] : greatest;
    return greatest;
}

OM_INLINE float take_exponentials(float greatest, float *values, int64_t count) {
    for (int64_t n = 0; n < count; n++) values[n] = om_exp(values[n] - greatest);
    return sum_of(values, count);
}

static float exponentials(float *values, int64_t count) {
    return take_exponentials(greatest_of(values, count), values, count);
}

static void sigmoids(float *values, int64_t count) {
    for (int64_t i = 0; i < count; i++) values[i] = om_over(1.0f, values[i]);
}
