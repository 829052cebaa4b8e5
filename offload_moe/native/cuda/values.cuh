/* Matrices of plain numbers, bf16 or fp32, times fp32 activations: 32 virtual lanes a row, of which each of eight threads has
 * four that lie beside each other, so that it loads four numbers at once. */
#ifndef OM_VALUES_CUH
#define OM_VALUES_CUH

#include "linear.cuh"

struct four {
    float of[4];
};

OM_DEVICE four load_four(bool is_bf16, const void *plane, long long at) {
    four values;
#ifdef OM_SHIM
    for (int j = 0; j < 4; j++) values.of[j] = load_value(is_bf16, plane, at + j);
#else
    if (is_bf16) {
        u32 low, high;
        asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "l"((const u16 *)plane + at));
        values.of[0] = from_bf16(low & 0xffffu), values.of[1] = __uint_as_float(low & 0xffff0000u);
        values.of[2] = from_bf16(high & 0xffffu), values.of[3] = __uint_as_float(high & 0xffff0000u);
    } else {
        const uint4 w = load16((const float *)plane + at);
        values.of[0] = __uint_as_float(w.x), values.of[1] = __uint_as_float(w.y);
        values.of[2] = __uint_as_float(w.z), values.of[3] = __uint_as_float(w.w);
    }
#endif
    return values;
}

/* Those of them that lie before `end`, then zeros. */
OM_DEVICE four load_some(bool is_bf16, const void *plane, long long row, int at, int end) {
    four values;
#pragma unroll
    for (int j = 0; j < 4; j++) values.of[j] = at + j < end ? load_value(is_bf16, plane, row + at + j) : 0.0f;
    return values;
}

template <int R> struct lanes_of_four {
    float of[R][4];
};

template <int COLS, int R>
OM_DEVICE void add_four(const four &weights, const float *x, int at, bool is_whole, lanes_of_four<R> &lanes) {
#pragma unroll
    for (int t = 0; t < R; t++) {
        const four values = is_whole && COLS % 4 == 0 ? load_four(false, x, (long long)t * COLS + at)
                                                      : load_some(false, x, (long long)t * COLS, at, COLS);
#pragma unroll
        for (int j = 0; j < 4; j++) lanes.of[t][j] = __fmaf_rn(values.of[j], weights.of[j], lanes.of[t][j]);
    }
}

/* j and j + 16 first, then j and j + 8, 4, 2, 1. Thread `part` of a row's eight has lanes 4 * part and on. */
OM_DEVICE float sum_of_row(const float (&lanes)[4]) {
    float sum[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        sum[j] = lanes[j];
#pragma unroll
        for (int d = 4; d; d >>= 1) sum[j] = __fadd_rn(sum[j], __shfl_xor_sync(OM_WARP, sum[j], d));
    }
    return __fadd_rn(__fadd_rn(sum[0], sum[2]), __fadd_rn(sum[1], sum[3]));
}

/* sums[t]: row `row` of a plane times row t of x, by the eight threads of a row, which all have it. */
template <int CODEC, int COLS, int R> OM_DEVICE void multiply_row(const u8 *plane, int row, const float *x, float (&sums)[R]) {
    constexpr int WHOLE = COLS / 32 * 32;
    constexpr bool IS_BF16 = CODEC == OM_BF16;
    const int part = threadIdx.x % 8;
    const long long first = (long long)row * COLS;
    lanes_of_four<R> lanes;
#pragma unroll
    for (int t = 0; t < R; t++)
#pragma unroll
        for (int j = 0; j < 4; j++) lanes.of[t][j] = 0.0f;
#pragma unroll 4
    for (int i = 4 * part; i < WHOLE; i += 32) {
        const four weights = COLS % 4 == 0 ? load_four(IS_BF16, plane, first + i) : load_some(IS_BF16, plane, first, i, COLS);
        add_four<COLS, R>(weights, x, i, true, lanes);
    }
    if (WHOLE < COLS) { /* lanes behind the last column add a product of zeros */
        const four weights = load_some(IS_BF16, plane, first, WHOLE + 4 * part, COLS);
        add_four<COLS, R>(weights, x, WHOLE + 4 * part, false, lanes);
    }
#pragma unroll
    for (int t = 0; t < R; t++) sums[t] = sum_of_row(lanes.of[t]);
}

/* With the bias in its record, or none: as the library does, no result is -0 then. */
OM_DEVICE float with_own_bias(const u8 *record, const om_card_matrix &matrix, int row, float sum) {
    return __fadd_rn(sum, matrix.bias < 0 ? 0.0f : bias_at(record, matrix, row));
}

template <int CODEC, int COLS, int R> OM_DEVICE void values(const om_card_linear_params &p) {
    if (*p.pass.stop) return;
    constexpr int ROWS = OM_VALUES_THREADS / 8;
    int at = blockIdx.x;
    const int which = find_matrix(p, ROWS, at), num_rows = *p.pass.num_rows, rows = p.matrices[which].rows;
    const int wanted = at * ROWS + threadIdx.x / 8, row = wanted < rows ? wanted : rows - 1, part = threadIdx.x % 8;
    float sums[R];
    multiply_row<CODEC, COLS, R>(p.records[which] + p.matrices[which].codes, row, p.x, sums);
#pragma unroll
    for (int t = 0; t < R; t++) {
        float value = with_own_bias(p.records[which], p.matrices[which], row, sums[t]);
        if (p.biases[which]) value = __fadd_rn(value, p.biases[which][row]);
        if (part == 0 && wanted < rows && t < num_rows) p.outs[which][(long long)t * rows + row] = value;
    }
}

#define OM_DEFINE_VALUES(name, codec, cols, R) \
    OM_KERNEL __launch_bounds__(OM_VALUES_THREADS) name(const om_card_linear_params p) { values<codec, cols, R>(p); }

#endif
