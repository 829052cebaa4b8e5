/* Panels in plain C: the definition that every other set is compared with, and the last panel of rows that are no multiple of 16. */
#include "gguf_types.h"
#include "panel_elementwise.h"

/* The weights of one block, in the order of a token's quants. */
OM_INLINE void decode_block(const int codec, const uint8_t *codes, int num_rows, int8_t weights[OM_PANEL][OM_BLOCK]) {
    static const int8_t nf4_levels[16] = {OM_NF4_LEVELS}, mxfp4_levels[16] = {OM_MXFP4_LEVELS};
    const int8_t *levels = codec == OM_NF4 ? nf4_levels : mxfp4_levels;
    const int groups = OM_GROUPS(codec), half = OM_BLOCK / groups / 2, dwords = OM_ROW_DWORDS(codec) / groups;
    for (int v = 0; v < OM_ROW_DWORDS(codec); v++)
        for (int r = 0; r < num_rows; r++)
            for (int k = 0; k < 4; k++) {
                const uint8_t byte = codes[(v * num_rows + r) * 4 + k];
                if (codec == OM_INT8) {
                    weights[r][4 * v + k] = (int8_t)byte;
                    continue;
                }
                int8_t *group = weights[r] + v / dwords * 2 * half + v % dwords * 4 + k;
                group[0] = levels[byte & 15];
                group[half] = levels[byte >> 4];
            }
}

/* Of a row and one group of its columns. */
OM_INLINE float weight_scale(const int codec, const om_weights *w, int64_t row, int64_t group, const uint8_t *scale) {
    if (codec == OM_INT8) {
        float value;
        __builtin_memcpy(&value, scale, sizeof value);
        return value;
    }
    if (codec == OM_MXFP4) return om_e8m0(*scale);
    return om_fma(om_map_formula(*scale), w->nested_scales[(row * w->blocks + group) / OM_NESTED], w->nested_offset);
}

OM_INLINE float segment_with(const int codec, int64_t group, float segment, float sum, float scale) {
    const int is_first = group % (2 * OM_GROUPS(codec)) == 0;
    return is_first ? sum * scale : om_fma(sum, scale, segment);
}

OM_INLINE void portable_panel(const int codec, const om_weights *w, int64_t first_row, int num_rows, const om_panel_tile *tile,
                              float *results, int64_t stride) {
    const int groups = OM_GROUPS(codec), count = OM_BLOCK / groups, num_tokens = tile->num_tokens;
    const uint8_t *codes = w->codes + first_row * w->row_bytes, *scales = om_panel_scales(w, first_row);
    float totals[OM_TILE][OM_PANEL] = {{0}}, segments[OM_TILE][OM_PANEL] = {{0}};
    for (int64_t b = 0; b < w->blocks; b++, codes += OM_ROW_DWORDS(codec) * 4 * num_rows) {
        int8_t weights[OM_PANEL][OM_BLOCK];
        decode_block(codec, codes, num_rows, weights);
        for (int64_t g = b * groups; g < (b + 1) * groups; g++)
            for (int r = 0; r < num_rows; r++) {
                const float scale = weight_scale(codec, w, first_row + r, g, scales + (g * num_rows + r) * OM_SCALE_BYTES(codec));
                for (int t = 0; t < num_tokens; t++) {
                    const int8_t *quants = tile->quants + (b * num_tokens + t) * OM_BLOCK + g % groups * count;
                    int32_t sum = 0;
                    for (int i = 0; i < count; i++) sum += weights[r][g % groups * count + i] * quants[i];
                    segments[t][r] =
                        segment_with(codec, g, segments[t][r], (float)sum, scale * tile->scales[g * num_tokens + t]);
                }
            }
        if (b % 2 == 0 && b + 1 < w->blocks) continue;
        for (int t = 0; t < num_tokens; t++)
            for (int r = 0; r < num_rows; r++) totals[t][r] += segments[t][r];
    }
    for (int t = 0; t < num_tokens; t++)
        for (int r = 0; r < num_rows; r++) results[t * stride + r] = totals[t][r] * om_panel_unit(codec);
}

/* Sums of a chunk's codes times a block of quants: of 16 columns each. */
static void sums_of_16(const om_gguf_chunk *chunk, int block, const int8_t *quants, int32_t sums[OM_SUMS]) {
    for (int j = 0; j < OM_SUMS; j++) {
        sums[j] = 0;
        for (int i = 16 * j; i < 16 * (j + 1); i++) sums[j] += chunk->codes[block * OM_BLOCK + i] * quants[i];
    }
}

/* Adds a block of a type with blocks of 32 to a segment, which `is_first` begins. */
static float add_flat(const om_gguf_chunk *chunk, int has_mins, const int8_t *quants, float scale, const int32_t *inputs, int is_first,
                      float segment) {
    int32_t sums[OM_SUMS];
    sums_of_16(chunk, 0, quants, sums);
    for (int j = 0; j < 2; j++) {
        const float sum = (float)(sums[2 * j] + sums[2 * j + 1]), product = chunk->steps[j] * scale;
        segment = is_first && j == 0 ? sum * product : om_fma(sum, product, segment);
        if (has_mins) segment = om_fma((float)(inputs[2 * j] + inputs[2 * j + 1]), chunk->least[j] * scale, segment);
    }
    return segment;
}

/* Adds a superblock to a row's total. A tile's values are `stride` tokens apart. */
static float add_superblock(const om_gguf_chunk *chunk, int has_mins, const om_panel_tile *tile, int64_t first_block, int t,
                            float total) {
    const int T = tile->num_tokens;
    float codes = 0.0f, least = 0.0f;
    for (int c = 0; c < OM_SUPERBLOCK / OM_BLOCK; c++) {
        const int64_t b = first_block + c;
        int32_t sums[OM_SUMS], scaled = 0, mins = 0;
        sums_of_16(chunk, c, tile->quants + (b * T + t) * OM_BLOCK, sums);
        for (int j = 0; j < OM_SUMS; j++) {
            scaled += chunk->scales[c * OM_SUMS + j] * sums[j];
            mins -= chunk->mins[c * OM_SUMS + j] * tile->corrections[(b * OM_SUMS + j) * T + t];
        }
        codes = om_fma((float)scaled, tile->scales[b * T + t], codes);
        least = om_fma((float)mins, tile->scales[b * T + t], least);
    }
    total = om_fma(codes, chunk->steps[0], total);
    return has_mins ? om_fma(least, chunk->least[0], total) : total;
}

/* One row of a panel of a type of GGUF, times a tile. */
static void gguf_row(const om_weights *w, int64_t first_row, int num_rows, int r, const om_panel_tile *tile, float *totals) {
    const int codec = w->codec, T = tile->num_tokens, of_256 = OM_IS_OF_256(codec), has_mins = om_has_mins(codec);
    const int64_t dwords = om_chunk_dwords(codec), chunks = w->blocks * OM_BLOCK / OM_CHUNK_COLUMNS(codec);
    const uint8_t *codes = w->codes + first_row * w->row_bytes, *sides = w->scales + first_row * chunks * OM_SIDE_BYTES;
    float segments[OM_TILE] = {0};
    for (int64_t k = 0; k < chunks; k++) {
        uint8_t bytes[OM_MOST_DWORDS * 4 + OM_SIDE_BYTES];
        om_gguf_chunk chunk;
        om_gguf_collect(codec, codes + (k * dwords * num_rows + r) * 4, sides + (k * num_rows + r) * OM_SIDE_BYTES, num_rows, bytes);
        om_gguf_decode(codec, bytes, &chunk);
        for (int t = 0; t < T; t++) {
            if (of_256) {
                totals[t] = add_superblock(&chunk, has_mins, tile, k * (OM_SUPERBLOCK / OM_BLOCK), t, totals[t]);
                continue;
            }
            int32_t inputs[OM_SUMS];
            for (int j = 0; j < OM_SUMS; j++) inputs[j] = tile->corrections[(k * OM_SUMS + j) * T + t];
            segments[t] = add_flat(&chunk, has_mins, tile->quants + (k * T + t) * OM_BLOCK, tile->scales[k * T + t], inputs,
                                   k % 2 == 0, segments[t]);
            if (k % 2 == 1 || k + 1 == chunks) totals[t] += segments[t];
        }
    }
}

static void portable_gguf(const om_weights *w, int64_t first_row, int num_rows, const om_panel_tile *tile, float *results,
                          int64_t stride) {
    for (int r = 0; r < num_rows; r++) {
        float totals[OM_TILE] = {0};
        gguf_row(w, first_row, num_rows, r, tile, totals);
        for (int t = 0; t < tile->num_tokens; t++)
            results[t * stride + r] = w->codec == OM_GGUF_MXFP4 ? totals[t] * (1.0f / OM_MXFP4_UNIT) : totals[t];
    }
}

void om_portable_panel(const om_weights *w, int64_t first_row, int num_rows, const om_panel_tile *tile, float *results,
                       int64_t stride) {
    switch (w->codec) {
    case OM_NF4: portable_panel(OM_NF4, w, first_row, num_rows, tile, results, stride); break;
    case OM_INT8: portable_panel(OM_INT8, w, first_row, num_rows, tile, results, stride); break;
    case OM_MXFP4: portable_panel(OM_MXFP4, w, first_row, num_rows, tile, results, stride); break;
    default: portable_gguf(w, first_row, num_rows, tile, results, stride); break;
    }
}

static void portable_rows(const om_weights *w, int64_t first_row, int64_t num_rows, const om_panel_tile *tile, float *results,
                          int64_t stride) {
    for (int64_t r = 0; r < num_rows; r += OM_PANEL)
        om_portable_panel(w, first_row + r, (int)(num_rows - r < OM_PANEL ? num_rows - r : OM_PANEL), tile, results + r, stride);
}

const om_panel_set om_panels_portable = {
    .rows = {[OM_NF4] = portable_rows, [OM_INT8] = portable_rows, [OM_MXFP4] = portable_rows, [OM_Q4_0] = portable_rows, [OM_Q4_1] = portable_rows,
             [OM_Q5_0] = portable_rows, [OM_Q5_1] = portable_rows, [OM_Q8_0] = portable_rows, [OM_IQ4_NL] = portable_rows,
             [OM_GGUF_MXFP4] = portable_rows, [OM_Q2_K] = portable_rows, [OM_Q3_K] = portable_rows, [OM_Q4_K] = portable_rows,
             [OM_Q5_K] = portable_rows, [OM_Q6_K] = portable_rows, [OM_IQ4_XS] = portable_rows},
    .quantize_blocks = panel_quantize_blocks,
    .activate = panel_activate};
