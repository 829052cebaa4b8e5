/* The segments of some panels, by all threads of a block, and their sums. */
#ifndef OM_SEGMENTS_CUH
#define OM_SEGMENTS_CUH

#include "gguf.cuh"

/* What a lane reads of one block: the scales of its four rows. */
template <int CODEC> struct lane_scales {
    u32 words[CODEC == OM_INT8 ? 4 : CODEC == OM_MXFP4 ? 2 : 1]; /* fp32 of each row, or a byte of each row */
};

/* Four scales of 1 byte. */
OM_DEVICE u32 load_bytes(bool is_aligned, const u8 *p, int count) {
    if (is_aligned) return load4(p);
    u32 word = 0;
    for (int r = 0; r < 4; r++)
        if (r < count) word |= load1(p + r) << 8 * r;
    return word;
}

/* WHOLE: the panel has 16 rows. ALIGNED: and its scales begin where four of them are one load. */
template <int CODEC, bool WHOLE, bool ALIGNED> OM_DEVICE lane_scales<CODEC> load_scales(const panel_place &place, int block) {
    lane_scales<CODEC> scales;
    const int n = WHOLE ? 16 : place.n, row = 4 * place.lane, count = n - row;
    if constexpr (CODEC == OM_INT8) {
        const u8 *from = place.scales + (block * n + row) * 4;
        if constexpr (ALIGNED) {
            const uint4 words = load16(from);
            scales.words[0] = words.x, scales.words[1] = words.y, scales.words[2] = words.z, scales.words[3] = words.w;
        } else
            for (int r = 0; r < 4; r++) scales.words[r] = r < count ? load4(from + 4 * r) : 0;
    } else {
#pragma unroll
        for (int g = 0; g < codes_of<CODEC>::GROUPS; g++)
            scales.words[g] = load_bytes(ALIGNED, place.scales + (block * codes_of<CODEC>::GROUPS + g) * n + row, count);
    }
    return scales;
}

/* Of the lane's row r in group g of a block; once: its nested scale where that is the same for the whole row. */
template <int CODEC, int BLOCKS>
OM_DEVICE float scale_of(const panel_part &part, const float *map, const lane_scales<CODEC> &scales, int row, int block, int g, int r,
                         float once) {
    if (CODEC == OM_INT8) return __uint_as_float(scales.words[r]);
    const u32 code = scales.words[g] >> 8 * r & 255;
    if (CODEC == OM_MXFP4) return e8m0(code);
    const float nested = 256 % BLOCKS == 0 ? once : load_float(part.nested + ((u32)(row * BLOCKS + block) >> 8));
    return __fmaf_rn(map[code], nested, part.offset);
}

/* segment[t][r] of the lane's rows: two blocks, or one. Every lane of a warp takes all steps: a block behind the last one is read
 * again and counts nothing. */
template <int CODEC, int BLOCKS, int T, bool WHOLE, bool ALIGNED>
OM_DEVICE void multiply_segment(const panel_part &part, const panel_place &place, int segment, const om_card_input &input,
                                const tile_rows<T> &rows, level_words words, const float *map, float (&sums)[T][4]) {
    typedef codes_of<CODEC> codec;
    constexpr int COUNT = 8 / codec::GROUPS, STEPS = codec::DWORDS / COUNT; /* dwords at a time */
    float once[4];
    int row[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int in_panel = WHOLE || 4 * place.lane + r < place.n ? 4 * place.lane + r : place.n - 1;
        row[r] = place.first_row + in_panel;
        once[r] = CODEC == OM_NF4 && 256 % BLOCKS == 0 ? load_float(part.nested + ((u32)(row[r] * BLOCKS) >> 8)) : 0.0f;
    }
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
        for (int r = 0; r < 4; r++) sums[t][r] = 0.0f;
#pragma unroll 1
    for (int i = 0; i < 2; i++) {
        const int wanted = 2 * segment + i, block = BLOCKS % 2 == 0 || wanted < BLOCKS ? wanted : BLOCKS - 1;
        const lane_scales<CODEC> scales = load_scales<CODEC, WHOLE, ALIGNED>(place, block);
        const signed char *x = input.quants + block * 64;
        uint4 codes[8];
        lane_sums<T> products;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            constexpr bool ALL = codec::GROUPS > 1; /* groups of a block are loaded at once */
            if (!ALL || step == 0) {
#pragma unroll
                for (int v = 0; v < 8; v++) codes[v] = load_dwords<WHOLE>(place, block * codec::DWORDS + step * 8 + v);
                OM_ISSUE;
            }
            if (ALL || step == 0) clear(products);
            multiply<CODEC, T, COUNT>(words, codes + (ALL ? step * COUNT : 0), x + step * 32, rows, BLOCKS * 64, products);
            if (!ALL && step + 1 < STEPS) continue;
            const int g = ALL ? step : 0;
            float scale[4];
#pragma unroll
            for (int r = 0; r < 4; r++) scale[r] = scale_of<CODEC, BLOCKS>(part, map, scales, row[r], block, g, r, once[r]);
            if (BLOCKS % 2 == 1 && wanted >= BLOCKS) continue;
#pragma unroll
            for (int t = 0; t < T; t++) {
                const float x_scale = load_float(input.scales + (rows.of[t] * BLOCKS + block) * codec::GROUPS + g);
#pragma unroll
                for (int r = 0; r < 4; r++)
                    sums[t][r] = __fmaf_rn(__int2float_rn(total_of<CODEC, T>(products, t, r)), __fmul_rn(scale[r], x_scale), sums[t][r]);
            }
        }
    }
}

/* A thread block's panels: PARTS parts of a matrix or two matrices, GROUP / PARTS panels of each. R rows of activations at most. */
template <int CODEC, int COLS, int GROUP, int PARTS, int R> struct panel_group {
    static constexpr int BLOCKS = OM_CARD_UP(COLS, 64), UNITS = OM_CARD_UNITS(CODEC, COLS);
    static constexpr int CHUNK = OM_CARD_CHUNK(CODEC, GROUP, COLS, R), THREADS = OM_CARD_THREADS(CODEC, GROUP, COLS, R);
    static constexpr int SUMS = OM_HAS_MINS(CODEC) ? 2 : 1; /* of a unit */
    struct memory {
        panel_tables<CODEC> tables;
        float parts[GROUP * CHUNK * R * SUMS * 16];              /* [panel, unit, row of activations, sum, row] */
        u32 steps[OM_IS_OF_256(CODEC) ? GROUP * CHUNK * 16 : 1]; /* [panel, unit, row]: scales of superblocks */
        float results[GROUP * R * 16];                           /* [panel, row of activations, row] */
    };
};

/* Thread blocks that the registers of a multiprocessor suffice for: one row leaves 64 registers a thread, enough for its loads, or
 * 80 for int8, GGUF's blocks of 32 and where there is code for panels of fewer than 16 rows (both: 96); two rows 96, more take what
 * they need. Superblocks have 128 and 168. Without a number ptxas spills a few of them. */
template <int CODEC, int THREADS, int T, bool ARE_WHOLE> struct occupancy {
    static constexpr bool ARE_LARGE = OM_IS_OF_256(CODEC), ARE_SMALL = ARE_WHOLE && CODEC != OM_INT8 && !OM_IS_GGUF(CODEC);
    static constexpr bool IS_GGUF_LINEAR = OM_IS_GGUF(CODEC) && !ARE_WHOLE;
    static constexpr int OF_ONE_ROW = ARE_LARGE ? 512 : ARE_SMALL ? 1024 : IS_GGUF_LINEAR ? 640 : 768;
    static constexpr int OF_TWO = ARE_LARGE ? 384 : 640;
    static constexpr int MOST = T == 1 ? OF_ONE_ROW : T == 2 ? OF_TWO : THREADS;
    static constexpr int BLOCKS = MOST > THREADS ? MOST / THREADS : 1;
};

/* A lane's sums of a superblock into memory.parts and memory.steps, where `is_wanted`. */
template <class G, int CODEC, int COLS, int T, bool WHOLE>
OM_DEVICE void multiply_superblock(const panel_place &place, int superblock, const om_card_input &input, const tile_rows<T> &rows,
                                   int unit, bool is_wanted, typename G::memory &m) {
    superblock_sums<T> sums;
    if constexpr (CODEC == OM_Q4_K)
        multiply_q4_k<COLS, T, WHOLE>(place, superblock, input, rows, sums);
    else
        multiply_q6_k<COLS, T, WHOLE>(place, superblock, input, rows, sums);
    if (!is_wanted) return;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int row = 4 * place.lane + r;
        m.steps[unit * 16 + row] = sums.steps[r];
#pragma unroll
        for (int t = 0; t < T; t++) {
            float *part = m.parts + (unit * T + t) * G::SUMS * 16 + row;
            part[0] = sums.codes[t][r];
            if (OM_HAS_MINS(CODEC)) part[16] = sums.least[t][r];
        }
    }
}

/* One chunk of units into memory.parts. */
template <class G, int CODEC, int COLS, int GROUP, int PARTS, int T, bool WHOLE, bool ALIGNED>
OM_DEVICE void multiply_chunk(const panel_part (&parts)[PARTS], int first_panel, int first_unit, const om_card_input &input,
                              const tile_rows<T> &rows, level_words words, typename G::memory &m) {
    const int unit = threadIdx.x / 4, in_group = unit / G::CHUNK, wanted = first_unit + unit % G::CHUNK;
    const bool is_second = PARTS == 2 && in_group >= GROUP / PARTS && in_group < GROUP;
    const panel_part part = is_second ? parts[PARTS - 1] : parts[0];
    const int panels = OM_CARD_PANELS(part.rows), wanted_panel = first_panel + in_group % (GROUP / PARTS);
    const int panel = wanted_panel < panels ? wanted_panel : panels - 1, first_row = panel * 16;
    const int safe_unit = wanted < G::UNITS ? wanted : G::UNITS - 1;
    const bool is_wanted = in_group < GROUP && wanted < G::UNITS;
    panel_place place;
    place.codes = part.codes + first_row * row_bytes<CODEC, COLS>::CODES;
    place.scales = part.scales + first_row * row_bytes<CODEC, COLS>::SCALES;
    place.n = part.rows - first_row < 16 ? part.rows - first_row : 16;
    place.lane = threadIdx.x % 4;
    place.first_row = part.first_row + first_row;
    if constexpr (OM_IS_OF_256(CODEC)) {
        multiply_superblock<G, CODEC, COLS, T, WHOLE>(place, safe_unit, input, rows, unit, is_wanted, m);
    } else {
        float sums[T][4];
        if constexpr (OM_IS_GGUF(CODEC))
            multiply_chunks<CODEC, COLS, T, WHOLE>(place, safe_unit, input, rows, words, sums);
        else
            multiply_segment<CODEC, G::BLOCKS, T, WHOLE, ALIGNED>(part, place, safe_unit, input, rows, words, m.tables.map, sums);
        if (!is_wanted) return;
#pragma unroll
        for (int t = 0; t < T; t++)
#pragma unroll
            for (int r = 0; r < 4; r++) m.parts[(unit * T + t) * 16 + 4 * place.lane + r] = sums[t][r];
    }
}

/* `total` and the sums of `count` units from `first` on, of row `row` and row t of activations, in their order. */
template <class G, int CODEC, int T>
OM_DEVICE float add_units(const typename G::memory &m, int first, int count, int t, int row, float total) {
    const float *part = m.parts + (first * T + t) * G::SUMS * 16 + row;
#pragma unroll 4
    for (int s = 0; s < count; s++, part += T * G::SUMS * 16) {
        if (!OM_IS_OF_256(CODEC)) {
            total = __fadd_rn(total, part[0]);
            continue;
        }
        const u32 steps = m.steps[(first + s) * 16 + row];
        total = __fmaf_rn(part[0], from_half(steps), total);
        if (OM_HAS_MINS(CODEC)) total = __fmaf_rn(part[16], from_half(steps >> 16), total);
    }
    return total;
}

/* memory.results of `T` rows of activations, without bias; panels behind the last one are those of the last one. */
template <class G, int CODEC, int COLS, int GROUP, int PARTS, int T, bool WHOLE, bool ALIGNED>
OM_DEVICE void multiply_panels(const panel_part (&parts)[PARTS], int first_panel, const om_card_input &input,
                               const tile_rows<T> &rows, typename G::memory &m) {
    level_words words = words_of<CODEC, T == 1>();
    if (OM_HAS_LEVELS(CODEC)) {
        if (threadIdx.x < 32) m.tables.levels[0][threadIdx.x] = words.low, m.tables.levels[1][threadIdx.x] = words.high;
        __syncthreads();
        words.low = m.tables.levels[0][threadIdx.x % 32], words.high = m.tables.levels[1][threadIdx.x % 32];
    }
#pragma unroll 1
    for (int first = 0; first < G::UNITS; first += G::CHUNK) {
        multiply_chunk<G, CODEC, COLS, GROUP, PARTS, T, WHOLE, ALIGNED>(parts, first_panel, first, input, rows, words, m);
        __syncthreads();
        const int count = G::UNITS - first < G::CHUNK ? G::UNITS - first : G::CHUNK;
        for (int i = threadIdx.x; i < GROUP * T * 16; i += G::THREADS) {
            const int in_group = i / (T * 16);
            const float before = first == 0 ? 0.0f : m.results[i];
            const float total = add_units<G, CODEC, T>(m, in_group * G::CHUNK, count, i / 16 % T, i % 16, before);
            m.results[i] = first + count < G::UNITS ? total : __fmul_rn(total, unit_of_levels<CODEC>());
        }
        __syncthreads();
    }
}

#endif
