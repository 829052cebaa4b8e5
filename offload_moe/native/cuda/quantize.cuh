/* Activations in int8, one scale for a group of 64 columns (32 for mxfp4), in the order of the codes that they meet. */
#ifndef OM_QUANTIZE_CUH
#define OM_QUANTIZE_CUH

#include "common.cuh"

#define OM_NO_BITS 0x0d800000u       /* 2^-100: a group of smaller values counts as zero */
#define OM_INFINITE_BITS 0x7f800000u /* above it are the NaNs */

/* One warp, one block of 64: a lane has two neighbours. */
template <int CODEC> OM_DEVICE void quantize_block(float even, float odd, signed char *quants, float *scales) {
    const u32 lane = threadIdx.x % 32, mine = __float_as_uint(even) & 0x7fffffffu, other = __float_as_uint(odd) & 0x7fffffffu;
    u32 most = mine > other ? mine : other;
#pragma unroll
    for (int d = CODEC == OM_MXFP4 ? 8 : 16; d; d >>= 1) {
        const u32 theirs = __shfl_xor_sync(OM_WARP, most, d);
        most = theirs > most ? theirs : most;
    }
    const bool is_usable = most >= OM_NO_BITS && most < OM_INFINITE_BITS;
    const float greatest = __uint_as_float(is_usable ? most : 0x3f800000u), inverse = __fdiv_rn(127.0f, greatest);
    const u32 first = __float_as_uint(__fadd_rn(__fmul_rn(even, inverse), OM_MAGIC));
    const u32 second = __float_as_uint(__fadd_rn(__fmul_rn(odd, inverse), OM_MAGIC));
    const u32 low = CODEC == OM_NF4 ? second : first, high = CODEC == OM_NF4 ? first : second; /* nf4: the low nibble is odd */
    ((u16 *)quants)[lane] = is_usable ? (u16)((low & 255) | (high & 255) << 8) : (u16)0;
    const float scale = is_usable ? __fdiv_rn(greatest, 127.0f) : most < OM_NO_BITS ? 0.0f : __uint_as_float(0x7fc00000u);
    if (CODEC == OM_MXFP4 ? lane % 16 == 0 : lane == 0) scales[lane / 16] = scale;
}

/* One block of a row of `BLOCKS`, for each codec that has an input. */
template <int BLOCKS> OM_DEVICE void quantize_for(const om_card_input *inputs, int row, int block, float even, float odd) {
    const int at = row * BLOCKS + block;
    if (inputs[OM_NF4].quants)
        quantize_block<OM_NF4>(even, odd, inputs[OM_NF4].quants + 64 * at, inputs[OM_NF4].scales + at);
    if (inputs[OM_INT8].quants)
        quantize_block<OM_INT8>(even, odd, inputs[OM_INT8].quants + 64 * at, inputs[OM_INT8].scales + at);
    if (inputs[OM_MXFP4].quants)
        quantize_block<OM_MXFP4>(even, odd, inputs[OM_MXFP4].quants + 64 * at, inputs[OM_MXFP4].scales + 2 * at);
}

template <int COLS> OM_DEVICE void quantize(const om_card_quantize_params &p) {
    if (*p.pass.stop) return;
    const int row = blockIdx.y, block = (blockIdx.x * OM_QUANTIZE_THREADS + threadIdx.x) / 32;
    constexpr int BLOCKS = OM_CARD_UP(COLS, 64);
    if (row >= *p.pass.num_rows || block >= BLOCKS) return; /* the same for a warp */
    const int at = 64 * block + 2 * (threadIdx.x % 32);
    const float *x = p.x + (long long)row * COLS;
    quantize_for<BLOCKS>(p.inputs, row, block, at < COLS ? x[at] : 0.0f, at + 1 < COLS ? x[at + 1] : 0.0f);
}

/* A pair has a row of its own: its row of x times its weight. */
template <int COLS> OM_DEVICE void scale(const om_card_scale_params &p) {
    if (*p.pass.stop) return;
    const int pair = blockIdx.y, block = (blockIdx.x * OM_QUANTIZE_THREADS + threadIdx.x) / 32;
    constexpr int BLOCKS = OM_CARD_UP(COLS, 64);
    if (pair >= *p.pass.num_rows * p.top_k || block >= BLOCKS) return; /* the same for a warp */
    const int at = 64 * block + 2 * (threadIdx.x % 32);
    const float *x = p.x + (long long)(pair / p.top_k) * COLS, weight = __fmul_rn(p.weights[pair], p.weight_scale);
    quantize_for<BLOCKS>(p.inputs, pair, block, at < COLS ? __fmul_rn(weight, x[at]) : 0.0f,
                         at + 1 < COLS ? __fmul_rn(weight, x[at + 1]) : 0.0f);
}

#define OM_DEFINE_QUANTIZE(name, cols) \
    OM_KERNEL __launch_bounds__(OM_QUANTIZE_THREADS) name(const om_card_quantize_params p) { quantize<cols>(p); }

#define OM_DEFINE_SCALE(name, cols) \
    OM_KERNEL __launch_bounds__(OM_QUANTIZE_THREADS) name(const om_card_scale_params p) { scale<cols>(p); }

#endif
