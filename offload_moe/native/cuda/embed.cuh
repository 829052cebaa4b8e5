/* Rows of the embedding. */
#ifndef OM_EMBED_CUH
#define OM_EMBED_CUH

#include "common.cuh"

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
        const float value = is_known ? load_value(CODEC == OM_BF16, p.table, (long long)token * HIDDEN + i) : __uint_as_float(0x7fc00000u);
        p.x[(long long)row * HIDDEN + i] = __fmul_rn(p.scale, value);
    }
}

#define OM_DEFINE_EMBED(name, codec, hidden) \
    OM_KERNEL __launch_bounds__(OM_EMBED_THREADS) name(const om_card_embed_params p) { embed<codec, hidden>(p); }

#endif
