/* Rows of the embedding: of numbers, or of blocks of GGUF's types as they lie in a file, decoded as the `gguf` package does. */
#ifndef OM_EMBED_CUH
#define OM_EMBED_CUH

#include "panels.cuh"

OM_DEVICE float half_at(const u8 *p) { return from_half(load2(p)); }

/* Bytes of a row of so many columns. */
template <int CODEC> OM_DEVICE long long table_row_bytes(int columns) {
    return CODEC == OM_Q8_0 ? columns / 32 * 34 : columns / 256 * (CODEC == OM_Q4_K ? 144 : 210);
}

OM_DEVICE float q8_0_at(const u8 *row, int i) {
    const u8 *block = row + i / 32 * 34;
    return __fmul_rn((float)(signed char)load1(block + 2 + i % 32), half_at(block));
}

OM_DEVICE float q4_k_at(const u8 *row, int i) {
    const u8 *block = row + i / 256 * 144, *packed = block + 4;
    const int at = i % 256, j = at / 32, k = j % 4;
    const u32 low = load1(packed + k), second = load1(packed + 4 + k), high = load1(packed + 8 + k);
    const u32 scale = j < 4 ? low & 63 : (high & 15) | low >> 6 << 4, least = j < 4 ? second & 63 : high >> 4 | second >> 6 << 4;
    const u32 code = load1(block + 16 + at / 64 * 32 + at % 32) >> at / 32 % 2 * 4 & 15;
    const float d = __fmul_rn(half_at(block), (float)scale), m = __fmul_rn(half_at(block + 2), (float)least);
    return __fadd_rn(__fmul_rn(d, (float)code), -m);
}

OM_DEVICE float q6_k_at(const u8 *row, int i) {
    const u8 *block = row + i / 256 * 210;
    const int at = i % 256, half = at / 128, n = at / 32 % 4;
    const u32 low = load1(block + half * 64 + n % 2 * 32 + at % 32) >> n / 2 * 4 & 15;
    const u32 high = load1(block + 128 + half * 32 + at % 32) >> 2 * n & 3;
    const float d = __fmul_rn(half_at(block + 208), (float)(signed char)load1(block + 192 + at / 16));
    return __fmul_rn(d, (float)((int)(low | high << 4) - 32));
}

/* Number i of a row of the table. */
template <int CODEC, int HIDDEN> OM_DEVICE float table_at(const void *table, int token, int i) {
    if (!OM_IS_GGUF(CODEC)) return load_value(CODEC == OM_BF16, table, (long long)token * HIDDEN + i);
    const u8 *row = (const u8 *)table + token * table_row_bytes<CODEC>(HIDDEN);
    return CODEC == OM_Q8_0 ? q8_0_at(row, i) : CODEC == OM_Q4_K ? q4_k_at(row, i) : q6_k_at(row, i);
}

template <int CODEC, int HIDDEN> OM_DEVICE void embed(const om_card_embed_params &p) {
    if (*p.pass.stop) return;
    const int row = blockIdx.y;
    if (row >= *p.pass.num_rows) return;
    const int token = p.tokens[row];
    const bool is_known = token >= 0 && token < p.num_tokens;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int i = (blockIdx.x * 4 + n) * OM_EMBED_THREADS + threadIdx.x;
        if (i >= HIDDEN) return;
        const float value = is_known ? table_at<CODEC, HIDDEN>(p.table, token, i) : __uint_as_float(0x7fc00000u);
        p.x[(long long)row * HIDDEN + i] = __fmul_rn(p.scale, value);
    }
}

#define OM_DEFINE_EMBED(name, codec, hidden) \
    OM_KERNEL __launch_bounds__(OM_EMBED_THREADS) name(const om_card_embed_params p) { embed<codec, hidden>(p); }

#endif
