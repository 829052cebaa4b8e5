/* Panels in plain C: the definition that every other set is compared with, and the last panel of rows that are no multiple of 16. */
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

void om_portable_panel(const om_weights *w, int64_t first_row, int num_rows, const om_panel_tile *tile, float *results,
                       int64_t stride) {
    switch (w->codec) {
    case OM_NF4: portable_panel(OM_NF4, w, first_row, num_rows, tile, results, stride); break;
    case OM_INT8: portable_panel(OM_INT8, w, first_row, num_rows, tile, results, stride); break;
    default: portable_panel(OM_MXFP4, w, first_row, num_rows, tile, results, stride); break;
    }
}

static void portable_rows(const om_weights *w, int64_t first_row, int64_t num_rows, const om_panel_tile *tile, float *results,
                          int64_t stride) {
    for (int64_t r = 0; r < num_rows; r += OM_PANEL)
        om_portable_panel(w, first_row + r, (int)(num_rows - r < OM_PANEL ? num_rows - r : OM_PANEL), tile, results + r, stride);
}

const om_panel_set om_panels_portable = {{portable_rows, portable_rows, portable_rows}, panel_quantize_blocks, panel_activate};
