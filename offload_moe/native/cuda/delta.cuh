/* Linear attention by gated delta rules behind its projections, as csrc/delta.h: convolution, norms of query and key, decay, update,
 * readout, gated norm, and int8. A thread block has whole heads of keys, as many as make blocks of 64 features, with the heads of
 * values that share them, and takes the rows of a sequence one after the other. A thread has channels of the convolution and
 * columns of the state, the same ones of every row, so nothing but itself reads what it leaves. Source: arXiv:2412.06464. */
#ifndef OM_DELTA_CUH
#define OM_DELTA_CUH

#include "quantize.cuh"
#include "softmax.cuh"
#include "view.cuh"

/* Of a state, which this kernel writes, too. */
OM_DEVICE float load_state(const float *p) {
#ifdef OM_SHIM
    return *p;
#else
    float value;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(p) : "memory");
    return value;
#endif
}

/* log(1 + exp(x)), as csrc/delta.h has it. */
OM_DEVICE float softplus(float x) {
    if (x > 20.0f) return x;
    const float y = own_exp(x), u = __fadd_rn(1.0f, y);
    return u == 1.0f ? y : __fmul_rn(own_log(u), __fdiv_rn(y, __fadd_rn(u, -1.0f)));
}

/* G heads of keys, S heads of values for each, K and V their dims, L taps. */
template <int G, int S, int K, int V, int L> struct delta_of {
    static constexpr int GROUP = OM_DELTA_GROUP(S * V), HEADS = GROUP * S, WIDTH = HEADS * V, THREADS = OM_DELTA_THREADS(S * V);
    static constexpr int KEYS = GROUP * K, ALL_KEYS = G * K, ALL_VALUES = G * S * V, CHANNELS = 2 * ALL_KEYS + ALL_VALUES;
    struct memory {
        float mixed[2 * KEYS + WIDTH]; /* queries, keys, and values, in whose place the rule's results come */
        float fading[HEADS], strength[HEADS], factor[HEADS];
    };
    /* Where channel `i` of a block comes from. */
    struct channel {
        const float *from;
        int number;
    };

    static __device__ __forceinline__ channel find(const om_card_delta_params &p, int row, int first, int i) {
        const bool is_value = i >= 2 * KEYS, is_key = i >= KEYS;
        const int n = is_value ? i - 2 * KEYS : is_key ? i - KEYS : i, size = is_value ? S * V : K;
        const int field = is_value ? 2 : is_key ? 1 : 0, head = first + n / size, at = n % size;
        const float *from = p.projected[field] + (long long)row * p.row_strides[field] + head * p.head_strides[is_value ? 1 : 0] + at;
        return {from, (is_value ? 2 * ALL_KEYS : is_key ? ALL_KEYS : 0) + head * size + at};
    }

    /* The window of a channel moves on by an input. Returns SiLU of its sum. */
    static __device__ __forceinline__ float convolve(const om_card_delta_params &p, const float *before, float *window, channel c) {
        const float *weight = p.conv_weight + c.number * L, input = *c.from;
        float sum = p.conv_bias ? p.conv_bias[c.number] : 0.0f;
        before += (long long)c.number * L, window += (long long)c.number * L;
#pragma unroll
        for (int t = 0; t + 1 < L; t++) {
            const float moved = load_state(before + t + 1);
            window[t] = moved;
            sum = __fmaf_rn(weight[t], moved, sum);
        }
        window[L - 1] = input;
        sum = __fmaf_rn(weight[L - 1], input, sum);
        return over(sum, sum);
    }

    static __device__ __forceinline__ void mix(const om_card_delta_params &p, int row, int first, memory &m) {
        const float *before = p.states[row].inputs + (long long)p.reads[row] * CHANNELS * L;
        float *window = p.states[row].inputs + (long long)p.leaves[row] * CHANNELS * L;
        for (int i = threadIdx.x; i < 2 * KEYS + WIDTH; i += THREADS) {
            const channel c = find(p, row, first, i);
            const int head = first + (i < 2 * KEYS ? i % KEYS / K : (i - 2 * KEYS) / (S * V));
            m.mixed[i] = head < G ? convolve(p, before, window, c) : 0.0f;
        }
    }

    /* Queries and keys of length 1, a warp for each, and the numbers of heads. */
    static __device__ __forceinline__ void normalize(const om_card_delta_params &p, int row, int first, memory &m) {
        for (int n = threadIdx.x / 32; n < 2 * GROUP; n += THREADS / 32) {
            float *values = m.mixed + n * K;
            const float scaling = n < GROUP ? __fdiv_rn(1.0f, __fsqrt_rn((float)K)) : 1.0f;
            const float scale = __fdiv_rn(scaling, __fsqrt_rn(__fadd_rn(dot_of_lanes(values, values, K), 1e-6f)));
            __syncwarp();
            for (int i = threadIdx.x % 32; i < K; i += 32) values[i] = __fmul_rn(values[i], scale);
        }
        for (int h = threadIdx.x; h < HEADS && first + h / S < G; h += THREADS) {
            const int head = first * S + h, at = (first + h / S) * p.head_strides[3] + h % S;
            const float time = softplus(__fadd_rn(p.projected[5][(long long)row * p.row_strides[5] + at], p.time_biases[head]));
            m.fading[h] = own_exp(__fmul_rn(p.decays[head], time));
            m.strength[h] = over(1.0f, p.projected[4][(long long)row * p.row_strides[4] + at]);
        }
    }

    /* A column of a head's state fades, takes up so much of the difference from its value, and is read by the query. */
    static __device__ __forceinline__ float step(const float *from, float *to, const float *query, const float *key, float fading,
                                                 float strength, float value) {
        float column[K], sum = 0.0f;
#pragma unroll
        for (int i = 0; i < K; i++) column[i] = load_state(from + i * V);
#pragma unroll
        for (int i = 0; i < K; i++) {
            column[i] = __fmul_rn(column[i], fading);
            sum = __fmaf_rn(column[i], key[i], sum);
        }
        const float change = __fmul_rn(__fmaf_rn(sum, -1.0f, value), strength);
        sum = 0.0f;
#pragma unroll
        for (int i = 0; i < K; i++) {
            const float changed = __fmaf_rn(change, key[i], column[i]);
            to[i * V] = changed;
            sum = __fmaf_rn(changed, query[i], sum);
        }
        return sum;
    }

    static __device__ __forceinline__ void move_on(const om_card_delta_params &p, int row, int first, memory &m) {
        const float *from = p.states[row].state + (long long)p.reads[row] * ALL_VALUES * K;
        float *to = p.states[row].state + (long long)p.leaves[row] * ALL_VALUES * K;
#pragma unroll 1
        for (int c = threadIdx.x; c < WIDTH; c += THREADS) {
            const int h = c / V, group = h / S;
            if (first + group >= G) return;
            const long long at = (long long)(first * S + h) * K * V + c % V;
            float &value = m.mixed[2 * KEYS + c];
            value = step(from + at, to + at, m.mixed + group * K, m.mixed + KEYS + group * K, m.fading[h], m.strength[h], value);
        }
    }

    static __device__ __forceinline__ void find_factors(const om_card_delta_params &p, memory &m) {
        for (int h = threadIdx.x / 32; h < HEADS; h += THREADS / 32) {
            const float *values = m.mixed + 2 * KEYS + h * V;
            const float mean = __fdiv_rn(dot_of_lanes(values, values, V), (float)V);
            if (threadIdx.x % 32 == 0) m.factor[h] = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, p.epsilon)));
        }
    }

    /* Feature `at` of a block, normed and multiplied by SiLU of its gate. */
    static __device__ __forceinline__ float gated(const om_card_delta_params &p, int row, int first, int at, const memory &m) {
        const int head = first + at / (S * V);
        const float gate = p.projected[3][(long long)row * p.row_strides[3] + head * p.head_strides[2] + at % (S * V)];
        const float normed = __fmul_rn(__fmul_rn(m.mixed[2 * KEYS + at], m.factor[at / V]), p.norm[at % V]);
        return __fmul_rn(normed, over(gate, gate));
    }

    /* A warp has blocks of 64 features. */
    static __device__ __forceinline__ void give(const om_card_delta_params &p, int row, int first, const memory &m) {
        for (int block = threadIdx.x / 32; block < WIDTH / 64; block += THREADS / 32) {
            const int begin = first * S * V + 64 * block, feature = begin + threadIdx.x % 32 * 2, at = feature - first * S * V;
            if (begin >= ALL_VALUES) return;
            float2 pair = {0.0f, 0.0f};
            if (feature < ALL_VALUES) {
                pair = {gated(p, row, first, at, m), gated(p, row, first, at + 1, m)};
                if (p.out) *(float2 *)(p.out + (long long)row * ALL_VALUES + feature) = pair;
            }
            quantize_for<OM_CARD_UP(ALL_VALUES, 64)>(p.inputs, row, begin / 64, pair.x, pair.y);
        }
    }
};

template <class D> OM_DEVICE void delta(const om_card_delta_params &p, typename D::memory &m) {
    if (*p.pass.stop) return;
    const int num_rows = *p.pass.num_rows, first = blockIdx.x * D::GROUP;
    int row = blockIdx.y;
    if (row >= num_rows) return;
    const float *own = p.states[row].state;
    if (row > 0 && p.states[row - 1].state == own) return; /* the block of the sequence's first row takes it */
#pragma unroll 1
    do {
        D::mix(p, row, first, m);
        __syncthreads();
        D::normalize(p, row, first, m);
        __syncthreads();
        D::move_on(p, row, first, m);
        __syncthreads();
        D::find_factors(p, m);
        __syncthreads();
        D::give(p, row, first, m);
        __syncthreads();
    } while (++row < num_rows && p.states[row].state == own);
}

#define OM_DEFINE_DELTA(name, num_key_heads, num_shared, key_dim, value_dim, taps) \
    typedef delta_of<num_key_heads, num_shared, key_dim, value_dim, taps> name##_sizes; \
    OM_KERNEL __launch_bounds__(name##_sizes::THREADS) name(const om_card_delta_params p) { \
        __shared__ name##_sizes::memory memory; \
        delta<name##_sizes>(p, memory); \
    }

#endif
