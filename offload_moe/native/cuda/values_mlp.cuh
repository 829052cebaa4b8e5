/* Gated MLPs of plain numbers that every row takes: dense layers and shared experts that are not quantized. Eight threads have a
 * row of a matrix, as in `values.cuh`. */
#ifndef OM_VALUES_MLP_CUH
#define OM_VALUES_MLP_CUH

#include "values.cuh"

template <int CODEC, int COLS, int INTERMEDIATE, int R, int ACTIVATION> OM_DEVICE void values_first(const om_card_values_first_params &p) {
    if (*p.pass.stop) return;
    const int wanted = blockIdx.x * (OM_VALUES_THREADS / 8) + threadIdx.x / 8, num_rows = *p.pass.num_rows;
    const int row = wanted < INTERMEDIATE ? wanted : INTERMEDIATE - 1;
    float gate[R], up[R];
    multiply_row<CODEC, COLS, R>(p.records[0] + p.matrices[0].codes, row, p.x, gate);
    multiply_row<CODEC, COLS, R>(p.records[1] + p.matrices[1].codes, row, p.x, up);
#pragma unroll
    for (int t = 0; t < R; t++) {
        const float of_gate = with_own_bias(p.records[0], p.matrices[0], row, gate[t]);
        const float of_up = with_own_bias(p.records[1], p.matrices[1], row, up[t]);
        const float value = __fmul_rn(activation<ACTIVATION>(of_gate), of_up);
        if (threadIdx.x % 8 == 0 && wanted < INTERMEDIATE && t < num_rows) p.hidden[(long long)t * INTERMEDIATE + row] = value;
    }
}

template <int CODEC, int COLS, int ROWS, int R> OM_DEVICE void values_second(const om_card_values_second_params &p) {
    if (*p.pass.stop) return;
    const int wanted = blockIdx.x * (OM_VALUES_THREADS / 8) + threadIdx.x / 8, num_rows = *p.pass.num_rows;
    const int row = wanted < ROWS ? wanted : ROWS - 1;
    float sums[R];
    multiply_row<CODEC, COLS, R>(p.record + p.matrix.codes, row, p.x, sums);
#pragma unroll
    for (int t = 0; t < R; t++) {
        if (threadIdx.x % 8 || wanted >= ROWS || t >= num_rows) continue;
        const float value = with_own_bias(p.record, p.matrix, row, sums[t]);
        p.out[(long long)t * p.stride * ROWS + row] = p.shares ? __fmul_rn(p.shares[t], value) : value;
    }
}

#define OM_DEFINE_VALUES_FIRST(name, codec, hidden, intermediate, R, activation) \
    OM_KERNEL __launch_bounds__(OM_VALUES_THREADS) name(const om_card_values_first_params p) { \
        values_first<codec, hidden, intermediate, R, activation>(p); \
    }

#define OM_DEFINE_VALUES_SECOND(name, codec, intermediate, hidden, R) \
    OM_KERNEL __launch_bounds__(OM_VALUES_THREADS) name(const om_card_values_second_params p) { \
        values_second<codec, intermediate, hidden, R>(p); \
    }

#endif
