/* Queries, keys and values of a row: bias, norms, rotation, scale; keys and values go to the cache. One thread block for a head. */
#ifndef OM_HEADS_CUH
#define OM_HEADS_CUH

#include "view.cuh"

/* As in csrc/api.h. */
enum { OM_HALVES = 0, OM_PAIRS_TO_HALVES = 1, OM_PAIRS = 2 };
enum { OM_NO_NORM = 0, OM_NORM_OF_HEAD = 1, OM_NORM_OF_ALL = 2, OM_NORM_OF_ROTATED = 3 /* of a head, behind its rotation */ };

/* Dim `o` of P rotated ones, as `om_rotate` orders them. */
template <int P, int ROTATION> OM_DEVICE float turned(const float *x, const float *cos, const float *signed_sin, int o) {
    constexpr int HALF = P / 2;
    if constexpr (ROTATION == OM_HALVES) {
        const int partner = o < HALF ? o + HALF : o - HALF;
        return __fadd_rn(__fmul_rn(x[o], cos[o]), __fmul_rn(x[partner], signed_sin[o]));
    } else {
        const bool is_second = ROTATION == OM_PAIRS ? o % 2 != 0 : o >= HALF;
        const int i = ROTATION == OM_PAIRS ? o / 2 : o - (is_second ? HALF : 0);
        const float own = x[2 * i + (is_second ? 1 : 0)], partner = x[2 * i + (is_second ? 0 : 1)];
        return __fadd_rn(__fmul_rn(own, cos[i]), __fmul_rn(partner, signed_sin[is_second ? i + HALF : i]));
    }
}

OM_DEVICE float with_bias(float value, const float *bias, int at) { return bias ? __fadd_rn(value, bias[at]) : value; }

/* factor = 1 / rms of the values, by the first warp, between two barriers. */
OM_DEVICE void find_factor(const float *values, int length, float epsilon, float *factor) {
    __syncthreads();
    if (threadIdx.x < 32) {
        const float mean = __fdiv_rn(dot_of_lanes(values, values, length), (float)length);
        if (threadIdx.x == 0) *factor = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, epsilon)));
    }
    __syncthreads();
}

template <int N, int M, int D, int SPAN> struct heads_memory {
    float values[SPAN == OM_NORM_OF_ALL ? (N > M ? N : M) * D : D], rotated[SPAN == OM_NORM_OF_ROTATED ? D : 1], factor;
};

/* values[D] of a head without rotation; is_wide: all heads of the row have one norm. step: numbers between two heads. Returns the
 * head's. */
template <int D>
OM_DEVICE float *norm_head(const float *heads, const float *bias, const float *norm, float epsilon, int num_heads, int head, int step,
                           bool is_wide, float *values, float *factor) {
    const int first = is_wide ? 0 : head * step, count = is_wide ? num_heads * D : D;
    float *own = values + (is_wide ? head * D : 0);
    for (int i = threadIdx.x; i < count; i += OM_HEADS_THREADS) values[i] = with_bias(heads[first + i], bias, first + i);
    if (!norm) return own;
    find_factor(values, count, epsilon, factor);
    for (int i = threadIdx.x; i < D; i += OM_HEADS_THREADS)
        own[i] = __fmul_rn(__fmul_rn(own[i], *factor), norm[is_wide ? head * D + i : i]);
    return own;
}

/* Of a query behind so many tokens. */
OM_DEVICE float query_scale(const om_card_heads_params &p, int position) {
    const float steps = __fdiv_rn((float)(position + 1), p.scale_step);
    const float whole = steps < 8388608.0f ? (float)(int)steps : steps; /* greater ones have no fraction */
    return __fadd_rn(__fmul_rn(p.scale_strength, own_log(__fadd_rn(whole, 1.0f))), 1.0f);
}

template <int N, int M, int D, int P, int ROTATION, int SPAN>
OM_DEVICE void heads(const om_card_heads_params &p, heads_memory<N, M, D, SPAN> &m) {
    if (*p.pass.stop) return;
    const int row = blockIdx.y, index = blockIdx.x;
    if (row >= *p.pass.num_rows) return;
    const bool is_query = index < N, is_value = index >= N + M;
    const int num_heads = is_query ? N : M, head = is_query ? index : is_value ? index - N - M : index - N;
    const float *from = is_query ? p.heads[0] : is_value ? p.heads[2] : p.heads[1];
    const float *bias = is_query ? p.biases[0] : is_value ? p.biases[2] : p.biases[1];
    const float *norm = SPAN == OM_NO_NORM || is_value ? nullptr : is_query ? p.norms[0] : p.norms[1];
    const float epsilon = is_query ? p.epsilons[0] : p.epsilons[1];
    const int step = is_query && p.is_gated ? 2 * D : D;
    const float *own = norm_head<D>(from + (long long)row * num_heads * step, bias, SPAN == OM_NORM_OF_ROTATED ? nullptr : norm,
                                    epsilon, num_heads, head, step, SPAN == OM_NORM_OF_ALL && norm, m.values, &m.factor);
    __syncthreads();
    const om_card_room &room = p.view.rooms[row];
    const int position = p.view.positions[row];
    const long long turn = (long long)position * P;
    const bool is_scaled = is_query && p.scale_step != 0.0f;
    const float scale = is_scaled ? query_scale(p, position) : 1.0f;
    void *const *pages = is_value ? room.value_pages : room.key_pages;
    const long long head_at = head * (is_value ? room.value_stride : room.key_stride);
    u16 *cached = is_query ? nullptr : row_of_token(pages, head_at, own_token(p.view, row), D);
    if constexpr (SPAN == OM_NORM_OF_ROTATED) {
        for (int i = threadIdx.x; i < D; i += OM_HEADS_THREADS)
            m.rotated[i] = i < P && !is_value ? turned<P, ROTATION>(own, p.angles.cos + turn, p.angles.signed_sin + turn, i) : own[i];
        if (norm) find_factor(m.rotated, D, epsilon, &m.factor);
    }
    for (int i = threadIdx.x; i < D; i += OM_HEADS_THREADS) {
        float value = own[i];
        if constexpr (SPAN == OM_NORM_OF_ROTATED) {
            value = norm ? __fmul_rn(__fmul_rn(m.rotated[i], m.factor), norm[i]) : m.rotated[i];
        } else if constexpr (P > 0) {
            if (i < P && !is_value) value = turned<P, ROTATION>(own, p.angles.cos + turn, p.angles.signed_sin + turn, i);
        }
        if (is_scaled) value = __fmul_rn(value, scale);
        if (is_query) p.query[((long long)row * N + head) * D + i] = value;
        else cached[i] = to_bf16(value);
    }
}

#define OM_DEFINE_HEADS(name, num_heads, num_kv_heads, head_dim, rotated_dims, rotation, norm_span) \
    OM_KERNEL __launch_bounds__(OM_HEADS_THREADS) name(const om_card_heads_params p) { \
        __shared__ heads_memory<num_heads, num_kv_heads, head_dim, norm_span> memory; \
        heads<num_heads, num_kv_heads, head_dim, rotated_dims, rotation, norm_span>(p, memory); \
    }

#endif
