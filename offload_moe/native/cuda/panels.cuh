/* Panels times the rows of a tile: docs/decisions/064-one-arithmetic.md, "A row times the activations".
 *
 * Four lanes share a panel's segment (two blocks of 64 columns): a lane has four rows of it, eight 16-byte loads of codes for a
 * block, and no shuffles. Segments meet in shared memory, where they are added in their order. */
#ifndef OM_PANELS_CUH
#define OM_PANELS_CUH

#include "common.cuh"

#define OM_IS_GGUF(codec) ((codec) >= OM_Q8_0)
#define OM_IS_OF_256(codec) ((codec) >= OM_CARD_SUPERBLOCKS)
#define OM_HAS_MINS(codec) ((codec) == OM_Q4_K)
#define OM_HAS_LEVELS(codec) ((codec) == OM_NF4 || (codec) == OM_MXFP4 || (codec) == OM_GGUF_MXFP4)

/* Levels by nibble, as bytes: those of codes 0 to 7 and of codes 8 to 15. Level / unit is the value. */
template <int CODEC> struct codes_of;
template <> struct codes_of<OM_NF4> {
    static constexpr int CHUNK = 64, DWORDS = 8, GROUPS = 1, SCALE_BYTES = 1; /* of a row in a chunk of columns */
    static constexpr u32 LOW_A = 0xcfbfaa84u, LOW_B = 0x00f5e9ddu, HIGH_A = 0x2a1f140au, HIGH_B = 0x7c5a4637u;
    static constexpr u32 SIZE_A = 0x3141567cu, SIZE_B = 0x000b1723u; /* of those that are negative: codes 0 to 7 */
};
template <> struct codes_of<OM_MXFP4> {
    static constexpr int CHUNK = 64, DWORDS = 8, GROUPS = 2, SCALE_BYTES = 1;
    static constexpr u32 LOW_A = 0x03020100u, LOW_B = 0x0c080604u, HIGH_A = 0xfdfeff00u, HIGH_B = 0xf4f8fafcu;
    static constexpr u32 SIZE_A = 0x03020100u, SIZE_B = 0x0c080604u; /* of codes 8 to 15 */
};
template <> struct codes_of<OM_INT8> {
    static constexpr int CHUNK = 64, DWORDS = 16, GROUPS = 1, SCALE_BYTES = 4;
    static constexpr u32 LOW_A = 0, LOW_B = 0, HIGH_A = 0, HIGH_B = 0, SIZE_A = 0, SIZE_B = 0;
};
template <> struct codes_of<OM_GGUF_MXFP4> : codes_of<OM_MXFP4> {
    static constexpr int GROUPS = 1, SCALE_BYTES = 2;
};
template <> struct codes_of<OM_Q8_0> : codes_of<OM_INT8> {
    static constexpr int DWORDS = 17, SCALE_BYTES = 0;
};
template <> struct codes_of<OM_Q4_K> : codes_of<OM_INT8> {
    static constexpr int CHUNK = 256, DWORDS = 36, SCALE_BYTES = 0;
};
template <> struct codes_of<OM_Q6_K> : codes_of<OM_INT8> {
    static constexpr int CHUNK = 256, DWORDS = 52, SCALE_BYTES = 2;
};

/* Bytes that a row of so many columns has in the planes of codes and of scales. */
template <int CODEC, int COLS> struct row_bytes {
    typedef codes_of<CODEC> codec;
    static constexpr int CHUNKS = OM_CARD_UP(COLS, codec::CHUNK);
    static constexpr long long CODES = CHUNKS * codec::DWORDS * 4, SCALES = CHUNKS * codec::GROUPS * codec::SCALE_BYTES;
};

template <int CODEC> OM_DEVICE float unit_of_levels() {
    return CODEC == OM_NF4 ? 1.0f / 124.11404726855135f : CODEC == OM_MXFP4 || CODEC == OM_GGUF_MXFP4 ? 0.5f : 1.0f;
}

/* 2^(code - 127). */
OM_DEVICE float e8m0(u32 code) { return __uint_as_float(code == 255 ? 0x7fc00000u : code ? code << 23 : 0x00400000u); }

/* A part of a matrix: where its first row begins, and that row's number in the record. */
struct panel_part {
    const u8 *codes, *scales;
    const float *nested;
    float offset;
    int first_row, rows;
};

/* The part that begins at `first_row`. */
template <int CODEC, int COLS>
OM_DEVICE panel_part open_part(const u8 *record, const om_card_matrix &m, int first_row, int rows) {
    panel_part part;
    part.codes = record + m.codes + first_row * row_bytes<CODEC, COLS>::CODES;
    part.scales = record + m.scales + first_row * row_bytes<CODEC, COLS>::SCALES;
    part.nested = CODEC == OM_NF4 ? (const float *)(record + m.nested_scales) : (const float *)0;
    part.offset = CODEC == OM_NF4 ? load_float(record + m.nested_offset) : 0.0f;
    part.first_row = first_row;
    part.rows = rows;
    return part;
}

OM_DEVICE float bias_at(const u8 *record, const om_card_matrix &m, int row) {
    return load_value(m.bias_dtype == OM_BF16_VALUES, record + m.bias, row);
}

/* bitsandbytes' dynamic map by its formula. */
OM_DEVICE float map_at(int code) {
    const int centred = code - 127, distance = centred < 0 ? -centred : centred;
    float start = 0.0f, step = 0x1.27476ep-21f;
    if (distance >= 2) start = -0x1.81e03cp-18f, step = 0x1.2dfd68p-18f;
    if (distance >= 4) start = -0x1.205bbap-14f, step = 0x1.797cbep-16f;
    if (distance >= 8) start = -0x1.85f070p-11f, step = 0x1.d7dbf6p-14f;
    if (distance >= 16) start = -0x1.f9db22p-8f, step = 0x1.26e978p-11f;
    if (distance >= 32) start = -0x1.41eb86p-4f, step = 0x1.70a3d8p-9f;
    if (distance >= 64) start = -0x1.95fff8p-1f, step = 0x1.ccccc6p-7f;
    if (distance >= 128) start = 1.0f, step = 0.0f;
    const float size = __fmaf_rn(step, (float)distance, start);
    return centred < 0 ? -size : size;
}

/* A panel of n rows; `lane` has rows 4 * lane and on. */
struct panel_place {
    const u8 *codes, *scales;
    int n, lane, first_row; /* the number of its first row in the record */
};

/* A dword of each of a lane's four rows; WHOLE: the panel has 16 rows. */
template <bool WHOLE> OM_DEVICE uint4 load_dwords(const panel_place &place, int dword) {
    if (WHOLE) return load_codes(place.codes + (dword * 16 + 4 * place.lane) * 4);
    const u8 *from = place.codes + (dword * place.n + 4 * place.lane) * 4;
    const int count = place.n - 4 * place.lane;
    uint4 w;
    w.x = count > 0 ? load4(from) : 0, w.y = count > 1 ? load4(from + 4) : 0;
    w.z = count > 2 ? load4(from + 8) : 0, w.w = count > 3 ? load4(from + 12) : 0;
    return w;
}

/* What the threads of a block share. A lane has its own copy of the words of `levels`: read from one address they become uniform
 * registers, and are moved again for each use. */
template <int CODEC> struct panel_tables {
    float map[CODEC == OM_NF4 ? 256 : 1];
    u32 levels[2][32];
};

/* Words of the levels that a lane keeps in registers; those beside them are constants of the instructions. */
struct level_words {
    u32 low, high; /* of codes 0 to 7, and 8 to 15 */
};

/* A tile of one row takes the sizes of levels, others take levels: see `multiply_sizes`. */
template <int CODEC, bool SIZES> OM_DEVICE level_words words_of() {
    typedef codes_of<CODEC> codec;
    level_words words = {codec::LOW_A, codec::HIGH_A};
    if (SIZES && CODEC == OM_NF4) words.low = codec::SIZE_A;
    if (SIZES && CODEC != OM_NF4) words.high = codec::SIZE_A;
    return words;
}

/* Visible after the next barrier. */
template <int CODEC, int THREADS> OM_DEVICE void fill_map(panel_tables<CODEC> &tables) {
    if (CODEC == OM_NF4)
        for (int i = threadIdx.x; i < 256; i += THREADS) tables.map[i] = map_at(i);
}

/* Integer sums of a lane's four rows. A tile of one row has two: of codes 0 to 7 and of codes 8 to 15, by their sizes. */
template <int T> struct lane_sums {
    int of[T == 1 ? 2 : T][4];
};

template <int T> OM_DEVICE void clear(lane_sums<T> &sums) {
#pragma unroll
    for (int t = 0; t < (T == 1 ? 2 : T); t++)
#pragma unroll
        for (int r = 0; r < 4; r++) sums.of[t][r] = 0;
}

template <int CODEC, int T> OM_DEVICE int total_of(const lane_sums<T> &sums, int t, int r) {
    if (T > 1) return sums.of[t][r];
    if (CODEC == OM_INT8) return sums.of[0][r];
    return CODEC == OM_NF4 ? sums.of[1][r] - sums.of[0][r] : sums.of[0][r] - sums.of[1][r];
}

/* Eight codes of one row times its quants: `x0` meets the low four nibbles, `x1` the others. For one row of activations in two
 * lookups: a selector whose bit 3 is set gives the sign of a byte, which sizes do not have, so codes of the other half count 0. */
template <int CODEC> OM_DEVICE void multiply_sizes(level_words words, u32 codes, u32 x0, u32 x1, int &low, int &high) {
    typedef codes_of<CODEC> codec;
    constexpr u32 LOW_B = CODEC == OM_NF4 ? codec::SIZE_B : codec::LOW_B, HIGH_B = CODEC == OM_NF4 ? codec::HIGH_B : codec::SIZE_B;
    const u32 flipped = codes ^ 0x88888888u;
    low = __dp4a((int)prmt(words.low, LOW_B, codes), (int)x0, low);
    low = __dp4a((int)prmt(words.low, LOW_B, codes >> 16), (int)x1, low);
    high = __dp4a((int)prmt(words.high, HIGH_B, flipped), (int)x0, high);
    high = __dp4a((int)prmt(words.high, HIGH_B, flipped >> 16), (int)x1, high);
}

/* The levels of the low four nibbles in .x, of the others in .y: three lookups for any number of rows of activations. */
template <int CODEC> OM_DEVICE uint2 levels_of(level_words words, u32 codes) {
    typedef codes_of<CODEC> codec;
    const u32 place = codes & 0x77777777u, half = 0x32103210u | (codes & 0x88888888u) >> 1;
    uint2 levels;
    levels.x = prmt(prmt(words.low, codec::LOW_B, place), prmt(words.high, codec::HIGH_B, place), half);
    levels.y = prmt(prmt(words.low, codec::LOW_B, place >> 16), prmt(words.high, codec::HIGH_B, place >> 16), half >> 16);
    return levels;
}

/* One dword of nibbles of each of four rows. x: of each row of activations, the eight quants in two words. */
template <int CODEC, int T>
OM_DEVICE void multiply_nibbles(level_words words, const uint4 &codes, const uint2 (&x)[T], lane_sums<T> &sums) {
    const u32 of_row[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int r = 0; r < 4; r++) {
        if (T == 1) {
            multiply_sizes<CODEC>(words, of_row[r], x[0].x, x[0].y, sums.of[0][r], sums.of[T == 1 ? 1 : 0][r]);
            continue;
        }
        const uint2 levels = levels_of<CODEC>(words, of_row[r]);
#pragma unroll
        for (int t = 0; t < T; t++)
            sums.of[t][r] = __dp4a((int)levels.y, (int)x[t].y, __dp4a((int)levels.x, (int)x[t].x, sums.of[t][r]));
    }
}

template <int T> OM_DEVICE void multiply_bytes(const uint4 &codes, const u32 (&x)[T], lane_sums<T> &sums) {
#pragma unroll
    for (int t = 0; t < T; t++) {
        sums.of[t][0] = __dp4a((int)codes.x, (int)x[t], sums.of[t][0]);
        sums.of[t][1] = __dp4a((int)codes.y, (int)x[t], sums.of[t][1]);
        sums.of[t][2] = __dp4a((int)codes.z, (int)x[t], sums.of[t][2]);
        sums.of[t][3] = __dp4a((int)codes.w, (int)x[t], sums.of[t][3]);
    }
}

/* The rows of activations that a tile reads, as rows of an input. */
template <int T> struct tile_rows {
    int of[T];
};

/* COUNT dwords of four rows times the quants from `x` on, which is in the first row of the input; `stride` bytes a row. */
template <int CODEC, int T, int COUNT>
OM_DEVICE void multiply(level_words words, const uint4 *codes, const signed char *x, const tile_rows<T> &rows, int stride,
                        lane_sums<T> &sums) {
    constexpr int STEP = CODEC == OM_INT8 ? 4 : 2; /* dwords that meet 16 quants */
#pragma unroll
    for (int v = 0; v < COUNT; v += STEP) {
        uint4 q[T];
#pragma unroll
        for (int t = 0; t < T; t++) q[t] = load16(x + rows.of[t] * stride + v * (CODEC == OM_INT8 ? 4 : 8));
        if (CODEC == OM_INT8) {
            u32 q0[T], q1[T], q2[T], q3[T];
#pragma unroll
            for (int t = 0; t < T; t++) q0[t] = q[t].x, q1[t] = q[t].y, q2[t] = q[t].z, q3[t] = q[t].w;
            multiply_bytes<T>(codes[v], q0, sums), multiply_bytes<T>(codes[v + 1], q1, sums);
            multiply_bytes<T>(codes[v + STEP - 2], q2, sums), multiply_bytes<T>(codes[v + STEP - 1], q3, sums);
        } else {
            uint2 low[T], high[T];
#pragma unroll
            for (int t = 0; t < T; t++) low[t].x = q[t].x, low[t].y = q[t].y, high[t].x = q[t].z, high[t].y = q[t].w;
            multiply_nibbles<CODEC, T>(words, codes[v], low, sums), multiply_nibbles<CODEC, T>(words, codes[v + 1], high, sums);
        }
    }
}

#endif
