/* Matrices in panels times the rows of an input, biases added. */
#ifndef OM_LINEAR_CUH
#define OM_LINEAR_CUH

#include "segments.cuh"

/* The matrix of a thread block; `group` becomes its group of panels within the matrix. */
OM_DEVICE int find_matrix(const om_card_linear_params &p, int rows_of_block, int &group) {
    int which = 0;
    for (int groups; which + 1 < p.num_matrices && group >= (groups = OM_CARD_UP(p.matrices[which].rows, rows_of_block)); which++)
        group -= groups;
    return which;
}

OM_DEVICE float with_biases(const om_card_linear_params &p, int which, int row, float value) {
    if (p.matrices[which].bias >= 0) value = __fadd_rn(value, bias_at(p.records[which], p.matrices[which], row));
    if (p.biases[which]) value = __fadd_rn(value, p.biases[which][row]);
    return value;
}

template <int CODEC, int COLS, int R> struct linear {
    static constexpr int GROUP = OM_LINEAR_GROUP(CODEC, COLS), TILE = OM_LINEAR_TILE(CODEC, R);
    typedef panel_group<CODEC, COLS, GROUP, 1, TILE> group;
    typedef typename group::memory memory;
    static constexpr int THREADS = group::THREADS, LEAST_BLOCKS = occupancy<CODEC, THREADS, TILE, false>::BLOCKS;

    /* Rows `first` and on of the input. */
    template <bool WHOLE>
    OM_DEVICE void multiply(const panel_part (&parts)[1], int panel, const om_card_input &input, int first, memory &m) {
        tile_rows<TILE> rows;
#pragma unroll
        for (int t = 0; t < TILE; t++) rows.of[t] = first + t;
        multiply_panels<group, CODEC, COLS, GROUP, 1, TILE, WHOLE, WHOLE>(parts, panel, input, rows, m);
    }

    OM_DEVICE void run(const om_card_linear_params &p, memory &m) {
        if (*p.pass.stop) return;
        int at = blockIdx.x;
        const int which = find_matrix(p, GROUP * 16, at), num_rows = *p.pass.num_rows, rows = p.matrices[which].rows;
        const int panel = at * GROUP;
        const panel_part parts[1] = {open_part<CODEC, COLS>(p.records[which], p.matrices[which], 0, rows)};
        fill_map<CODEC, THREADS>(m.tables);
#pragma unroll 1
        for (int first = 0; first < (R > TILE ? num_rows : 1); first += TILE) {
            if (rows % 16 == 0 || (panel + GROUP) * 16 <= rows)
                multiply<true>(parts, panel, p.input, first, m);
            else
                multiply<false>(parts, panel, p.input, first, m);
            for (int i = threadIdx.x; i < GROUP * TILE * 16; i += THREADS) {
                const int row = (panel + i / (TILE * 16)) * 16 + i % 16, t = first + i / 16 % TILE;
                if (t < num_rows && row < rows) p.outs[which][(long long)t * rows + row] = with_biases(p, which, row, m.results[i]);
            }
        }
    }
};

#define OM_DEFINE_LINEAR(name, codec, cols, R) \
    OM_KERNEL __launch_bounds__(linear<codec, cols, R>::THREADS, linear<codec, cols, R>::LEAST_BLOCKS) name(const om_card_linear_params p) { \
        __shared__ linear<codec, cols, R>::memory memory; \
        linear<codec, cols, R>::run(p, memory); \
    }

#endif
