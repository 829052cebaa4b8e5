/* The sum of the residual and what a block adds, its norm, and the norm in int8: one thread block for a row. */
#ifndef OM_NORM_CUH
#define OM_NORM_CUH

#include "quantize.cuh"
#include "softmax.cuh"

template <int HIDDEN> struct norm_memory {
    float values[HIDDEN], factor;
};

OM_DEVICE float added_at(const om_card_norm_params &p, const float *added, int i, int hidden) {
    float sum = p.from_zero ? __fadd_rn(0.0f, added[i]) : added[i];
    for (int n = 1; n < p.num_added; n++) sum = __fadd_rn(sum, added[(long long)n * hidden + i]);
    return sum;
}

/* values = x + scale * added */
template <int HIDDEN> OM_DEVICE void sum_row(const om_card_norm_params &p, int row, float *values) {
    const float *x = p.x + (long long)row * HIDDEN, *added = p.added;
    if (added) added += (long long)row * p.num_added * HIDDEN;
    for (int i = threadIdx.x; i < HIDDEN; i += OM_NORM_THREADS) {
        float value = x[i];
        if (added) value = __fadd_rn(value, __fmul_rn(p.scale, added_at(p, added, i, HIDDEN)));
        if (p.sum) p.sum[(long long)row * HIDDEN + i] = value;
        values[i] = value;
    }
}

/* The distances of values from their mean, by all threads. */
template <int HIDDEN> OM_DEVICE void center(norm_memory<HIDDEN> &m) {
    if (threadIdx.x < 32) {
        const float mean = __fdiv_rn(sum_of_warp(m.values, HIDDEN), (float)HIDDEN);
        if (threadIdx.x == 0) m.factor = mean;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HIDDEN; i += OM_NORM_THREADS) m.values[i] = __fadd_rn(m.values[i], -m.factor);
    __syncthreads();
}

template <int HIDDEN> OM_DEVICE void norm(const om_card_norm_params &p, norm_memory<HIDDEN> &m) {
    if (*p.pass.stop) return;
    const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int BLOCKS = OM_CARD_UP(HIDDEN, 64), WARPS = OM_NORM_THREADS / 32;
    if (row >= *p.pass.num_rows) return;
    sum_row<HIDDEN>(p, row, m.values);
    if (!p.weight) return;
    __syncthreads();
    if (p.bias) center<HIDDEN>(m);
    if (warp == 0) {
        const float mean = __fdiv_rn(dot_of_lanes(m.values, m.values, HIDDEN), (float)HIDDEN);
        const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, p.epsilon)));
        if (lane == 0) m.factor = factor;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HIDDEN; i += OM_NORM_THREADS) {
        float value = __fmul_rn(__fmul_rn(m.values[i], m.factor), p.weight[i]);
        if (p.bias) value = __fadd_rn(value, p.bias[i]);
        if (p.normed) p.normed[(long long)row * HIDDEN + i] = value;
        m.values[i] = value;
    }
    __syncthreads();
    if (p.gate && warp == WARPS - 1) {
        const float share = over(1.0f, dot_of_lanes(m.values, p.gate, HIDDEN));
        if (lane == 0) p.shares[row] = share;
    }
    for (int block = warp; block < BLOCKS; block += WARPS) {
        const int at = 64 * block + 2 * lane;
        quantize_for<BLOCKS>(p.inputs, row, block, at < HIDDEN ? m.values[at] : 0.0f, at + 1 < HIDDEN ? m.values[at + 1] : 0.0f);
    }
}

#define OM_DEFINE_NORM(name, hidden) \
    OM_KERNEL __launch_bounds__(OM_NORM_THREADS) name(const om_card_norm_params p) { \
        __shared__ norm_memory<hidden> memory; \
        norm<hidden>(p, memory); \
    }

#endif
