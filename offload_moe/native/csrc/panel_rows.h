/* Panels times 1..OM_TILE tokens: the loops, written once for every vector set. A slice is the rows that one vector has.
 *
 * The including file defines before:
 *   OM_SLICES                     of a panel; OM_SLICE_ROWS = 16 / OM_SLICES
 *   OM_SLICES_AT_ONCE(T)          as many as the registers hold sums of
 *   slice_f, slice_i              OM_SLICE_ROWS floats, integers
 *   sf_zero, sf_load, sf_store, sf_broadcast, sf_add, sf_mul, sf_fma(a, b, c) = a * b + c, sf_of_integers
 *   OM_SPAN                       blocks whose nested scales are decoded before their codes are read; 0: beside them
 *   map_codes(bytes)              om_map_formula of OM_SLICE_ROWS bytes
 *   pick_steps(steps, slice, b)   the nested scale of the slice's rows, b blocks behind where `steps` begins
 *   powers_of_two(bytes)          om_e8m0 of OM_SLICE_ROWS bytes
 *   group_sums(codec, T, H, codes, ahead, quants, corrections, sums)
 *                                 the integer sums of one group for H slices from `codes` on, each line read by om_line,
 *                                 sums[t * OM_SLICES + h] */
#include "cpu.h"
#include "panel_elementwise.h"

#define OM_UNROLL _Pragma("GCC unroll 16") /* sums stay in registers only where their indices are constants */
#define OM_SLICE_ROWS (OM_PANEL / OM_SLICES)
#define OM_ONE_POINTER(p) __asm__("" : "+r"(p)) /* else gcc 12 steps a pointer for each of its offsets, in memory */
#define OM_RANGE (OM_SPAN ? OM_SPAN : OM_NESTED)

/* Where a panel is read, and what is known of its scales from block `start` on. */
typedef struct {
    const om_weights *w;
    const uint8_t *codes, *scales;
    int64_t start, ahead; /* ahead: bytes from the codes to those that are prefetched */
    om_panel_steps steps;
    float decoded[(OM_SPAN ? OM_SPAN : 1) * OM_PANEL];
} panel_place;

OM_INLINE slice_f nf4_scale(const panel_place *place, int64_t b, const int slice) {
    const slice_f map = map_codes(place->scales + b * OM_PANEL + slice * OM_SLICE_ROWS);
    return sf_fma(map, pick_steps(&place->steps, slice, (int)(b % OM_NESTED)), sf_broadcast(place->w->nested_offset));
}

OM_INLINE slice_f scale_of(const int codec, const panel_place *place, int64_t group, const int slice) {
    const int64_t at = group * OM_PANEL + slice * OM_SLICE_ROWS;
    if (codec == OM_INT8) return sf_load((const float *)place->scales + at);
    if (codec == OM_MXFP4) return powers_of_two(place->scales + at);
    if (OM_SPAN) return sf_load(place->decoded + at - place->start * OM_PANEL);
    return nf4_scale(place, group, slice);
}

OM_INLINE void start_span(const int codec, panel_place *place, int64_t first_row, int64_t start, int64_t stop) {
    place->start = start;
    if (codec != OM_NF4) return;
    if (start % OM_NESTED == 0) om_find_steps(place->w, first_row, OM_PANEL, start, &place->steps);
    if (OM_SPAN)
        OM_UNROLL for (int h = 0; h < OM_SLICES; h++)
            for (int64_t b = start; b < stop; b++)
                sf_store(place->decoded + (b - start) * OM_PANEL + h * OM_SLICE_ROWS, nf4_scale(place, b, h));
}

/* The block's groups, into the segment: `is_first` begins one. */
OM_INLINE void add_block(const int codec, const int T, const panel_place *place, const om_panel_tile *tile, int64_t b,
                         const int is_first, slice_f *segment) {
    const int groups = OM_GROUPS(codec), dwords = OM_ROW_DWORDS(codec) / groups;
    const int H = OM_SLICES_AT_ONCE(T);
    const uint8_t *codes = place->codes + b * OM_BLOCK_BYTES(codec);
    const int8_t *quants = tile->quants + b * T * OM_BLOCK;
    const int32_t *corrections = tile->corrections + b * groups * T;
    const float *scales = tile->scales + b * groups * T;
    OM_ONE_POINTER(codes);
    OM_ONE_POINTER(quants);
    OM_ONE_POINTER(corrections);
    OM_ONE_POINTER(scales);
    OM_UNROLL for (int g = 0; g < groups; g++) OM_UNROLL for (int h0 = 0; h0 < OM_SLICES; h0 += H) {
        slice_i sums[OM_TILE * OM_SLICES];
        group_sums(codec, T, H, codes + (g * dwords * OM_PANEL + h0 * OM_SLICE_ROWS) * 4, place->ahead,
                   quants + g * (OM_BLOCK / groups), corrections + g * T, sums);
        OM_UNROLL for (int h = 0; h < H; h++) {
            const slice_f scale = scale_of(codec, place, b * groups + g, h0 + h);
            OM_UNROLL for (int t = 0; t < T; t++) {
                slice_f *target = segment + t * OM_SLICES + h0 + h;
                const slice_f sum = sf_of_integers(sums[t * OM_SLICES + h]);
                const slice_f product = sf_mul(scale, sf_broadcast(scales[g * T + t]));
                *target = is_first && g == 0 ? sf_mul(sum, product) : sf_fma(sum, product, *target);
            }
        }
    }
}

OM_INLINE void add_segment(const int T, slice_f *totals, const slice_f *segment) {
    OM_UNROLL for (int i = 0; i < T * OM_SLICES; i++) totals[i] = sf_add(totals[i], segment[i]);
}

OM_INLINE void whole_panel(const int codec, const int T, panel_place *place, int64_t first_row, const om_panel_tile *tile,
                           float *results, int64_t stride) {
    const int64_t blocks = place->w->blocks;
    slice_f totals[OM_TILE * OM_SLICES], segment[OM_TILE * OM_SLICES];
    OM_UNROLL for (int i = 0; i < T * OM_SLICES; i++) totals[i] = sf_zero();
    for (int64_t start = 0; start < blocks; start += OM_RANGE) {
        const int64_t stop = blocks - start < OM_RANGE ? blocks : start + OM_RANGE;
        int64_t b = start;
        start_span(codec, place, first_row, start, stop);
        for (; b + 2 <= stop; b += 2) {
            add_block(codec, T, place, tile, b, 1, segment);
            add_block(codec, T, place, tile, b + 1, 0, segment);
            add_segment(T, totals, segment);
        }
        if (b < stop) {
            add_block(codec, T, place, tile, b, 1, segment);
            add_segment(T, totals, segment);
        }
    }
    const slice_f unit = sf_broadcast(om_panel_unit(codec));
    OM_UNROLL for (int t = 0; t < T; t++) OM_UNROLL for (int h = 0; h < OM_SLICES; h++)
        sf_store(results + t * stride + h * OM_SLICE_ROWS, sf_mul(totals[t * OM_SLICES + h], unit));
}

OM_INLINE void panel_rows(const int codec, const int T, const om_weights *w, int64_t first_row, int64_t num_rows,
                          const om_panel_tile *tile, float *results, int64_t stride) {
    panel_place place = {.w = w, .ahead = om_panel_ahead(T)};
    int64_t r = 0;
    for (; r + OM_PANEL <= num_rows; r += OM_PANEL) {
        place.codes = w->codes + (first_row + r) * w->row_bytes;
        place.scales = om_panel_scales(w, first_row + r);
        whole_panel(codec, T, &place, first_row + r, tile, results + r, stride);
    }
    if (r < num_rows) om_portable_panel(w, first_row + r, (int)(num_rows - r), tile, results + r, stride);
}

#define OM_PANEL_CASE(CODEC, T) \
    case T: panel_rows(CODEC, T, w, first_row, num_rows, tile, results, stride); break;

#define OM_DEFINE_PANELS(NAME, CODEC) \
    static void NAME(const om_weights *w, int64_t first_row, int64_t num_rows, const om_panel_tile *tile, float *results, \
                     int64_t stride) { \
        switch (tile->num_tokens) { \
            OM_PANEL_CASE(CODEC, 1) OM_PANEL_CASE(CODEC, 2) OM_PANEL_CASE(CODEC, 3) \
            OM_PANEL_CASE(CODEC, 4) OM_PANEL_CASE(CODEC, 6) OM_PANEL_CASE(CODEC, 8) \
        } \
    }

OM_DEFINE_PANELS(panels_nf4, OM_NF4)
OM_DEFINE_PANELS(panels_int8, OM_INT8)
OM_DEFINE_PANELS(panels_mxfp4, OM_MXFP4)

#include "panel_gguf.h"

#define OM_PANEL_TABLE \
    {.rows = {[OM_NF4] = panels_nf4, [OM_INT8] = panels_int8, [OM_MXFP4] = panels_mxfp4, OM_GGUF_PANELS}, \
     .quantize_blocks = panel_quantize_blocks, .activate = panel_activate}
