/* GGUF's types in panels: docs/decisions/120-gguf-as-it-lies.md. A lane has four rows of a unit; every lane of a warp takes the
 * same steps. */
#ifndef OM_GGUF_CUH
#define OM_GGUF_CUH

#include "panels.cuh"

#define OM_NIBBLES 0x0f0f0f0fu
#define OM_ONES 0x01010101

OM_DEVICE u32 word_of(const uint4 &w, int n) { return n == 0 ? w.x : n == 1 ? w.y : n == 2 ? w.z : w.w; }

/* Byte n of a word with its sign. */
OM_DEVICE int signed_byte(u32 word, int n) { return (int)prmt(word, 0, 0x8880u + 0x1111u * n); }

/* The two bytes of each of four rows that fill no dword, two rows in a word. */
template <bool WHOLE> OM_DEVICE uint2 load_sides(const panel_place &place, int chunk) {
    if (WHOLE) return load8(place.scales + (chunk * 16 + 4 * place.lane) * 2);
    const u8 *from = place.scales + (chunk * place.n + 4 * place.lane) * 2;
    const int count = place.n - 4 * place.lane;
    uint2 w;
    w.x = (count > 0 ? load2(from) : 0) | (count > 1 ? load2(from + 2) << 16 : 0);
    w.y = (count > 2 ? load2(from + 4) : 0) | (count > 3 ? load2(from + 6) << 16 : 0);
    return w;
}

OM_DEVICE u32 side_of(const uint2 &sides, int r) { return (r < 2 ? sides.x : sides.y) >> 16 * (r % 2) & 0xffffu; }

/* Four dwords of MXFP4's nibbles of each of four rows: byte i has columns i and i + 16 of a block of 32. */
template <int T>
OM_DEVICE void multiply_mxfp4(level_words words, const uint4 *codes, const signed char *x, const tile_rows<T> &rows, int stride,
                              lane_sums<T> &sums) {
    uint4 low[T], high[T];
#pragma unroll
    for (int t = 0; t < T; t++) low[t] = load16(x + rows.of[t] * stride), high[t] = load16(x + rows.of[t] * stride + 16);
#pragma unroll
    for (int v = 0; v < 4; v++) {
        uint2 quants[T];
#pragma unroll
        for (int t = 0; t < T; t++) {
            quants[t].x = prmt(word_of(low[t], v), word_of(high[t], v), 0x5140);
            quants[t].y = prmt(word_of(low[t], v), word_of(high[t], v), 0x7362);
        }
        multiply_nibbles<OM_MXFP4, T>(words, codes[v], quants, sums);
    }
}

/* sums[t][r] of two chunks of a type with blocks of 32; a chunk behind the last one is read again and counts nothing. */
template <int CODEC, int COLS, int T, bool WHOLE>
OM_DEVICE void multiply_chunks(const panel_place &place, int unit, const om_card_input &input, const tile_rows<T> &rows,
                               level_words words, float (&sums)[T][4]) {
    constexpr int CHUNKS = COLS / 64, DWORDS = codes_of<CODEC>::DWORDS;
    constexpr bool IS_Q8 = CODEC == OM_Q8_0;
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
        for (int r = 0; r < 4; r++) sums[t][r] = 0.0f;
#pragma unroll 1
    for (int i = 0; i < 2; i++) {
        const int wanted = 2 * unit + i, chunk = CHUNKS % 2 == 0 || wanted < CHUNKS ? wanted : CHUNKS - 1;
        const signed char *x = input.quants + chunk * 64;
        const uint4 steps = IS_Q8 ? load_dwords<WHOLE>(place, chunk * DWORDS) : uint4();
        const uint2 exponents = IS_Q8 ? uint2() : load_sides<WHOLE>(place, chunk);
        uint4 codes[8];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (IS_Q8 || j == 0) {
#pragma unroll
                for (int v = 0; v < 8; v++) codes[v] = load_dwords<WHOLE>(place, chunk * DWORDS + (IS_Q8 ? 1 + 8 * j : 0) + v);
                OM_ISSUE;
            }
            lane_sums<T> products;
            clear(products);
            if constexpr (IS_Q8)
                multiply<OM_INT8, T, 8>(words, codes, x + 32 * j, rows, CHUNKS * 64, products);
            else
                multiply_mxfp4<T>(words, codes + 4 * j, x + 32 * j, rows, CHUNKS * 64, products);
            if (CHUNKS % 2 == 1 && wanted >= CHUNKS) continue;
            float step[4];
#pragma unroll
            for (int r = 0; r < 4; r++)
                step[r] = IS_Q8 ? from_half(word_of(steps, r) >> 16 * j) : e8m0(side_of(exponents, r) >> 8 * j & 255);
#pragma unroll
            for (int t = 0; t < T; t++) {
                const float x_scale = load_float(input.scales + rows.of[t] * CHUNKS + chunk);
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const int total = total_of<IS_Q8 ? OM_INT8 : OM_MXFP4, T>(products, t, r);
                    sums[t][r] = __fmaf_rn(__int2float_rn(total), __fmul_rn(step[r], x_scale), sums[t][r]);
                }
            }
        }
    }
}

/* What a lane makes of a superblock: the sums that its scales d and dmin multiply, and these of each row, in fp16. */
template <int T> struct superblock_sums {
    float codes[T][4], least[T][4];
    u32 steps[4];
};

template <int T> OM_DEVICE void clear(superblock_sums<T> &sums) {
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
        for (int r = 0; r < 4; r++) sums.codes[t][r] = sums.least[t][r] = 0.0f;
}

/* Scales and minima of the eight sub-blocks of a row of Q4_K, a byte each. */
struct sub_blocks {
    u32 scales[2], mins[2];
};

OM_DEVICE sub_blocks unpack_sub_blocks(u32 first, u32 second, u32 third) {
    sub_blocks found;
    found.scales[0] = first & 0x3f3f3f3fu, found.mins[0] = second & 0x3f3f3f3fu;
    found.scales[1] = (third & OM_NIBBLES) | (first >> 2 & 0x30303030u);
    found.mins[1] = (third >> 4 & OM_NIBBLES) | (second >> 2 & 0x30303030u);
    return found;
}

/* Integer sums of a group of 64 columns: of low and of high nibbles, whose columns are the first 32 and the others. */
template <int T> struct nibble_sums {
    int of[2][T][4], x[2][T];
};

template <int T> OM_DEVICE void clear(nibble_sums<T> &sums) {
#pragma unroll
    for (int g = 0; g < 2; g++)
#pragma unroll
        for (int t = 0; t < T; t++) {
            sums.x[g][t] = 0;
#pragma unroll
            for (int r = 0; r < 4; r++) sums.of[g][t][r] = 0;
        }
}

/* Adds four dwords of each row: 16 columns from `x` on, and those 32 behind them. */
template <int T>
OM_DEVICE void multiply_half(const uint4 (&codes)[4], const signed char *x, const tile_rows<T> &rows, int stride,
                             nibble_sums<T> &sums) {
#pragma unroll
    for (int g = 0; g < 2; g++) {
        uint4 quants[T];
#pragma unroll
        for (int t = 0; t < T; t++) {
            quants[t] = load16(x + rows.of[t] * stride + 32 * g);
#pragma unroll
            for (int v = 0; v < 4; v++) sums.x[g][t] = __dp4a(OM_ONES, (int)word_of(quants[t], v), sums.x[g][t]);
        }
#pragma unroll
        for (int v = 0; v < 4; v++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int code = (int)(word_of(codes[v], r) >> 4 * g & OM_NIBBLES);
#pragma unroll
                for (int t = 0; t < T; t++) sums.of[g][t][r] = __dp4a(code, (int)word_of(quants[t], v), sums.of[g][t][r]);
            }
    }
}

template <int COLS, int T, bool WHOLE>
OM_DEVICE void multiply_q4_k(const panel_place &place, int superblock, const om_card_input &input, const tile_rows<T> &rows,
                             superblock_sums<T> &out) {
    constexpr int BLOCKS = COLS / 64, DWORDS = codes_of<OM_Q4_K>::DWORDS;
    const int dword = superblock * DWORDS;
    uint4 head[4];
#pragma unroll
    for (int v = 0; v < 4; v++) head[v] = load_dwords<WHOLE>(place, dword + v);
    sub_blocks of_row[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        out.steps[r] = word_of(head[0], r);
        of_row[r] = unpack_sub_blocks(word_of(head[1], r), word_of(head[2], r), word_of(head[3], r));
    }
    clear(out);
#pragma unroll 1
    for (int c = 0; c < 4; c++) {
        const int block = 4 * superblock + c;
        nibble_sums<T> sums;
        clear(sums);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 codes[4];
#pragma unroll
            for (int v = 0; v < 4; v++) codes[v] = load_dwords<WHOLE>(place, dword + 4 + 8 * c + 4 * half + v);
            OM_ISSUE;
            multiply_half<T>(codes, input.quants + block * 64 + 16 * half, rows, COLS, sums);
        }
        float x_scales[T];
#pragma unroll
        for (int t = 0; t < T; t++) x_scales[t] = load_float(input.scales + rows.of[t] * BLOCKS + block);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const u32 scales = (c < 2 ? of_row[r].scales[0] : of_row[r].scales[1]) >> 16 * (c % 2);
            const u32 mins = (c < 2 ? of_row[r].mins[0] : of_row[r].mins[1]) >> 16 * (c % 2);
#pragma unroll
            for (int t = 0; t < T; t++) {
                const int scaled = (int)(scales & 255) * sums.of[0][t][r] + (int)(scales >> 8 & 255) * sums.of[1][t][r];
                const int least = -((int)(mins & 255) * sums.x[0][t] + (int)(mins >> 8 & 255) * sums.x[1][t]);
                out.codes[t][r] = __fmaf_rn(__int2float_rn(scaled), x_scales[t], out.codes[t][r]);
                out.least[t][r] = __fmaf_rn(__int2float_rn(least), x_scales[t], out.least[t][r]);
            }
        }
    }
}

/* Adds eight columns of each of four runs of half a superblock, 32 * n + 8 * eighth and on, to the sums of its two groups, of which
 * each has two runs. codes: a dword of runs 0 and 2, of runs 1 and 3, and their high bits; then those of the next four columns. */
template <int T>
OM_DEVICE void multiply_eighth(const uint4 (&codes)[6], const uint4 (&scales)[2], int eighth, const signed char *x,
                               const tile_rows<T> &rows, int stride, int (&scaled)[2][T][4]) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
        uint2 quants[T];
        int sums[T][4];
#pragma unroll
        for (int t = 0; t < T; t++) {
            quants[t] = load8(x + rows.of[t] * stride + 32 * n + 8 * eighth);
            const int total = __dp4a(OM_ONES, (int)quants[t].x, __dp4a(OM_ONES, (int)quants[t].y, 0));
#pragma unroll
            for (int r = 0; r < 4; r++) sums[t][r] = -32 * total; /* codes are centred by 32 */
        }
#pragma unroll
        for (int v = 0; v < 2; v++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const u32 low = word_of(codes[3 * v + n % 2], r) >> n / 2 * 4 & OM_NIBBLES, high = word_of(codes[3 * v + 2], r);
                const u32 code = low | ((n < 2 ? high << (4 - 2 * n) : high >> (2 * n - 4)) & 0x30303030u);
#pragma unroll
                for (int t = 0; t < T; t++) sums[t][r] = __dp4a((int)code, (int)(v ? quants[t].y : quants[t].x), sums[t][r]);
            }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int scale = signed_byte(word_of(scales[n / 2], r), n % 2 * 2 + eighth / 2);
#pragma unroll
            for (int t = 0; t < T; t++) scaled[n / 2][t][r] += scale * sums[t][r];
        }
    }
}

template <int COLS, int T, bool WHOLE>
OM_DEVICE void multiply_q6_k(const panel_place &place, int superblock, const om_card_input &input, const tile_rows<T> &rows,
                             superblock_sums<T> &out) {
    constexpr int BLOCKS = COLS / 64, DWORDS = codes_of<OM_Q6_K>::DWORDS;
    const int dword = superblock * DWORDS;
    const uint2 steps = load_sides<WHOLE>(place, superblock);
    uint4 head[4];
#pragma unroll
    for (int v = 0; v < 4; v++) head[v] = load_dwords<WHOLE>(place, dword + v);
#pragma unroll
    for (int r = 0; r < 4; r++) out.steps[r] = side_of(steps, r);
    clear(out);
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        const uint4 scales[2] = {half ? head[2] : head[0], half ? head[3] : head[1]};
        const int block = 4 * superblock + 2 * half;
        int scaled[2][T][4] = {};
#pragma unroll
        for (int eighth = 0; eighth < 4; eighth++) {
            uint4 codes[6];
#pragma unroll
            for (int v = 0; v < 6; v++) codes[v] = load_dwords<WHOLE>(place, dword + 4 + 24 * half + 6 * eighth + v);
            OM_ISSUE;
            multiply_eighth<T>(codes, scales, eighth, input.quants + block * 64, rows, COLS, scaled);
        }
#pragma unroll
        for (int g = 0; g < 2; g++)
#pragma unroll
            for (int t = 0; t < T; t++) {
                const float x_scale = load_float(input.scales + rows.of[t] * BLOCKS + block + g);
#pragma unroll
                for (int r = 0; r < 4; r++) out.codes[t][r] = __fmaf_rn(__int2float_rn(scaled[g][t][r]), x_scale, out.codes[t][r]);
            }
    }
}

#endif
