/* A router's choice: scores, the greatest K of E experts, their weights. The order is that of csrc/router.c. One thread block for a
 * row; `route_row` can be a part of another kernel, by all threads of a block of OM_ROUTE_THREADS. */
#ifndef OM_ROUTE_CUH
#define OM_ROUTE_CUH

#include "params_attention.h"
#include "softmax.cuh"

/* A router's settings, as in csrc/api.h. */
enum { OM_SOFTMAX = 0, OM_SIGMOID = 1, OM_MIXER = 2 };
template <int EXPERTS, int TOP_K, int GROUPS, int CHOSEN_GROUPS, int BEST, int SCORING, bool OF_CHOSEN> struct router_of {
    static constexpr int E = EXPERTS, K = TOP_K, NUM_GROUPS = GROUPS, NUM_CHOSEN_GROUPS = CHOSEN_GROUPS, SIZE = EXPERTS / GROUPS;
    static constexpr int NUM_BEST = BEST;
    static constexpr bool HAS_GROUPS = CHOSEN_GROUPS < GROUPS, IS_SIGMOID = SCORING == OM_SIGMOID, IS_MIXER = SCORING == OM_MIXER;
    static constexpr bool IS_OF_CHOSEN = OF_CHOSEN;
    struct memory {
        float logits[EXPERTS], scores[EXPERTS], wanted[EXPERTS], ranked[EXPERTS], groups[GROUPS], chosen[TOP_K], weights[TOP_K];
        int ids[TOP_K], chosen_groups[CHOSEN_GROUPS];
    };
    static_assert(EXPERTS % GROUPS == 0 && TOP_K <= EXPERTS / GROUPS * CHOSEN_GROUPS && EXPERTS <= 2048, "no router of such sizes");
};

/* scores[E], by the block; thread e % OM_ROUTE_THREADS has written logit e, and writes score e. */
template <class S> OM_DEVICE void score_experts(const float *logits, float *scores) {
    if (S::IS_SIGMOID) {
        for (int e = threadIdx.x; e < S::E; e += OM_ROUTE_THREADS) scores[e] = over(1.0f, logits[e]);
        return;
    }
    __syncthreads();
    const float greatest = greatest_of_warp(logits, S::E);
    for (int e = threadIdx.x; e < S::E; e += OM_ROUTE_THREADS) scores[e] = own_exp(__fadd_rn(logits[e], -greatest));
    __syncthreads();
    const float share = __fdiv_rn(1.0f, sum_of_warp(scores, S::E));
    __syncthreads();
    for (int e = threadIdx.x; e < S::E; e += OM_ROUTE_THREADS) scores[e] = __fmul_rn(scores[e], share);
}

/* A NaN is chosen as soon as all before it are, and not earlier: it ranks as the smallest of them. */
OM_DEVICE float ranked_value(const float *values, int at) {
    const float own = values[at];
    if (own == own) return own;
    float least = OM_GREATEST;
    for (int e = 0; e < at; e++) least = values[e] < least ? values[e] : least;
    return least;
}

/* ids of the `count` greatest values in order; of equal ones the lower. By the block, with barriers at its beginning and end. */
OM_DEVICE void choose_greatest(const float *values, int num_values, int count, float *ranked, int *ids) {
    __syncthreads();
    for (int e = threadIdx.x; e < num_values; e += OM_ROUTE_THREADS) ranked[e] = ranked_value(values, e);
    __syncthreads();
    for (int e = threadIdx.x; e < num_values; e += OM_ROUTE_THREADS) {
        const float own = ranked[e];
        int rank = 0;
#pragma unroll 4
        for (int other = 0; other < num_values; other++) rank += ranked[other] > own || (ranked[other] == own && other < e);
        if (rank < count) ids[rank] = e;
    }
    __syncthreads();
}

/* The greatest score of a group, or the sum of its two greatest. */
template <class S> OM_DEVICE float score_of_group(const float *scores) {
    float best = OM_LEAST, second = OM_LEAST;
    for (int e = 0; e < S::SIZE; e++) {
        const float score = scores[e];
        if (score > best) second = best, best = score;
        else if (score > second) second = score;
    }
    return S::NUM_BEST == 1 || S::SIZE == 1 ? best : __fadd_rn(best, second);
}

/* Experts outside of the best groups cannot be chosen. */
template <class S> OM_DEVICE void exclude_groups(typename S::memory &m) {
    __syncthreads();
    for (int g = threadIdx.x; g < S::NUM_GROUPS; g += OM_ROUTE_THREADS) m.groups[g] = score_of_group<S>(m.wanted + g * S::SIZE);
    choose_greatest(m.groups, S::NUM_GROUPS, S::NUM_CHOSEN_GROUPS, m.ranked, m.chosen_groups);
    for (int e = threadIdx.x; e < S::E; e += OM_ROUTE_THREADS) {
        bool is_chosen = false;
        for (int i = 0; i < S::NUM_CHOSEN_GROUPS; i++) is_chosen |= m.chosen_groups[i] == e / S::SIZE;
        if (!is_chosen) m.wanted[e] = OM_LEAST;
    }
}

/* weights of the chosen experts, by the first warp. chosen: their logits, or scores of a softmax of all; it is overwritten. */
template <class S> OM_DEVICE void weigh(float *chosen, float scale, float *weights) {
    const int lane = threadIdx.x % 32;
    float share = 1.0f, sum = 0.0f;
    if (!S::IS_SIGMOID && S::IS_OF_CHOSEN) {
        const float greatest = greatest_of_warp(chosen, S::K);
        for (int k = lane; k < S::K; k += 32) chosen[k] = own_exp(__fadd_rn(chosen[k], -greatest));
        __syncwarp();
        share = __fdiv_rn(1.0f, sum_of_warp(chosen, S::K));
    }
    if (S::IS_SIGMOID) {
        for (int k = lane; k < S::K; k += 32) chosen[k] = over(1.0f, chosen[k]);
        __syncwarp();
        for (int k = 0; k < S::K; k++) sum = __fadd_rn(sum, chosen[k]);
    }
    for (int k = lane; k < S::K; k += 32) {
        float weight = chosen[k];
        if (S::IS_OF_CHOSEN) weight = S::IS_SIGMOID ? __fdiv_rn(weight, __fadd_rn(sum, 1e-20f)) : __fmul_rn(weight, share);
        weights[k] = __fmul_rn(weight, scale);
    }
}

/* A sparse mixer's weights, by the first warp: each expert's share among those left whose logits are near its own. `logits` and
 * `near` are overwritten. */
template <class S> OM_DEVICE void mix(const int *ids, float jitter, float scale, float *logits, float *near, float *weights) {
    const int lane = threadIdx.x % 32;
    for (int k = 0; k < S::K; k++) {
        const float own = logits[ids[k]];
        for (int e = lane; e < S::E; e += 32) {
            const float left = logits[e], size = __uint_as_float(__float_as_uint(left) & 0x7fffffffu);
            const float divisor = size > own ? size : own;
            near[e] = __fdiv_rn(__fadd_rn(own, -left), divisor) > __fmul_rn(2.0f, jitter) ? OM_LEAST : left;
        }
        __syncwarp();
        const float greatest = greatest_of_warp(near, S::E);
        __syncwarp();
        for (int e = lane; e < S::E; e += 32) near[e] = own_exp(__fadd_rn(near[e], -greatest));
        __syncwarp();
        const float share = __fdiv_rn(1.0f, sum_of_warp(near, S::E));
        if (lane == 0) weights[k] = __fmul_rn(__fmul_rn(near[ids[k]], share), scale), logits[ids[k]] = OM_LEAST;
        __syncwarp();
    }
}

/* m.ids and m.weights of one row, for all threads. */
template <class S>
OM_DEVICE void route_row(const float *logits, const float *correction, float scale, float jitter, typename S::memory &m) {
    const bool has_scores = S::HAS_GROUPS || correction || !(S::IS_SIGMOID || S::IS_MIXER || S::IS_OF_CHOSEN);
    for (int e = threadIdx.x; e < S::E; e += OM_ROUTE_THREADS) m.logits[e] = m.wanted[e] = logits[e];
    if (has_scores) score_experts<S>(m.logits, m.scores);
    if (S::HAS_GROUPS || correction) /* without them scores are in the order of logits */
        for (int e = threadIdx.x; e < S::E; e += OM_ROUTE_THREADS)
            m.wanted[e] = correction ? __fadd_rn(m.scores[e], correction[e]) : m.scores[e];
    if constexpr (S::HAS_GROUPS) exclude_groups<S>(m);
    choose_greatest(m.wanted, S::E, S::K, m.ranked, m.ids);
    if (S::IS_MIXER && threadIdx.x < 32) {
        mix<S>(m.ids, jitter, scale, m.logits, m.scores, m.weights);
    } else if (threadIdx.x < 32) {
        for (int k = threadIdx.x; k < S::K; k += 32) m.chosen[k] = (S::IS_SIGMOID || S::IS_OF_CHOSEN ? m.logits : m.scores)[m.ids[k]];
        weigh<S>(m.chosen, scale, m.weights);
    }
    __syncthreads();
}

template <class S> OM_DEVICE void route(const om_card_route_params &p, typename S::memory &m) {
    if (*p.pass.stop) return;
    const int row = blockIdx.x;
    if (row >= *p.pass.num_rows) return;
    route_row<S>(p.logits + (long long)row * S::E, p.correction, p.scale, p.jitter, m);
    for (int k = threadIdx.x; k < S::K; k += OM_ROUTE_THREADS) {
        p.ids[row * S::K + k] = m.ids[k];
        p.weights[row * S::K + k] = m.weights[k];
    }
}

#define OM_DEFINE_ROUTE(name, num_experts, top_k, num_groups, num_chosen_groups, num_best, scoring, is_of_chosen) \
    OM_KERNEL __launch_bounds__(OM_ROUTE_THREADS) name(const om_card_route_params p) { \
        typedef router_of<num_experts, top_k, num_groups, num_chosen_groups, num_best, scoring, is_of_chosen> settings; \
        __shared__ settings::memory memory; \
        route<settings>(p, memory); \
    }

#endif
