/* Panels: up to 16 rows of a quantized matrix, transposed by dwords of codes and by scales, so that lanes are rows.
 *
 * A panel begins at the byte where its first row began in row order; docs/decisions/064-one-arithmetic.md has the layout and the
 * arithmetic. Shape legend: T tokens (1 to 4, 6 or 8), B blocks of 64 columns, G groups of columns that share a scale. */
#ifndef OM_PANEL_H
#define OM_PANEL_H

#include "levels.h"
#include "om_kernels.h"

#define OM_PANEL 16
#define OM_NESTED 256 /* absmax codes of a nested scale */
#define OM_GROUPS(codec) ((codec) == OM_MXFP4 ? 2 : 1)             /* of a block */
#define OM_ROW_DWORDS(codec) ((codec) == OM_INT8 ? 16 : 8)         /* of a row in a block */
#define OM_BLOCK_BYTES(codec) (OM_ROW_DWORDS(codec) * 4 * OM_PANEL) /* of a whole panel */
#define OM_SCALE_BYTES(codec) ((codec) == OM_INT8 ? 4 : 1)
#define OM_SUMS 4 /* of 16 quants each, of a block of activations for GGUF's types */
#define OM_CORRECTIONS(codec) (OM_IS_GGUF(codec) ? OM_SUMS : OM_GROUPS(codec)) /* of a block */

/* Else gcc 12 keeps all products or codes of a block, on the stack, and adds them last. */
#if defined(__clang__)
#define OM_IN_TURN(constraint, sum) ((void)(sum))
#else
#define OM_IN_TURN(constraint, sum) __asm__("" : constraint(sum))
#endif

/* The line of a panel there, beside a prefetch of the one so far behind it, which stays in this place: gcc gathers those of a
 * whole superblock at its beginning, where they wait for each other. */
OM_INLINE const uint8_t *om_line(const uint8_t *line, int64_t ahead) {
    OM_PREFETCH(line + ahead);
#if defined(__GNUC__)
    __asm__ volatile("" ::: "memory");
#endif
    return line;
}

/* One token's activations. A group's quants: those that meet low nibbles, then those that meet high ones; int8 and GGUF's types
 * in order. */
typedef struct {
    int8_t *quants;       /* [B, 64] */
    float *scales;        /* [G] */
    int32_t *corrections; /* [G]: -128 times the sum of a group's quants; of GGUF's types [B, 4]: the sums of 16 quants */
} om_panel_token;

/* The same of T tokens: quants [B, T, 64], scales and corrections [..., T]; and each one's numbers, for matrices of plain numbers. */
typedef struct {
    const int8_t *quants;
    const float *scales;
    const int32_t *corrections;
    int num_tokens;
    const float *values[OM_TILE];
} om_panel_tile;

/* results[token * stride + row - first_row], without bias. `first_row` begins a panel, and whole panels follow until the last. */
typedef void (*om_panel_fn)(const om_weights *w, int64_t first_row, int64_t num_rows, const om_panel_tile *tile, float *results,
                            int64_t stride);

om_panel_fn om_panels_of(int32_t codec);

struct om_panel_set {
    om_panel_fn rows[OM_NUM_CODECS]; /* [codec] */
    void (*quantize_blocks)(int32_t codec, const float *values, int64_t first_block, int64_t num_blocks, om_panel_token *token);
    void (*activate)(int32_t activation, float alpha, float limit, int has_gate, const float *gate, const float *up,
                     float *result, int64_t count);
};

extern const om_panel_set om_panels_portable;
extern const om_panel_set om_panels_avx2;
extern const om_panel_set om_panels_avx_vnni; /* without functions where the compiler does not have it */
extern const om_panel_set om_panels_avx512;
extern const om_panel_set om_panels_avx512_vbmi;
extern const om_panel_set om_panels_avx512_vl;
extern const om_panel_set om_panels_neon;

/* Any panel, whole or not, in plain C: what the definition says. */
void om_portable_panel(const om_weights *w, int64_t first_row, int num_rows, const om_panel_tile *tile, float *results,
                       int64_t stride);

/* Nested scales of a panel's rows from a block on that 256 divides: `first`, and from block `crossing` on `second`. */
typedef struct {
    float first[OM_PANEL], second[OM_PANEL];
    int32_t crossing[OM_PANEL]; /* blocks from there */
} om_panel_steps;

OM_INLINE void om_find_steps(const om_weights *w, int64_t first_row, int num_rows, int64_t block, om_panel_steps *steps) {
    const int64_t last = (w->rows * w->blocks - 1) / OM_NESTED;
    for (int r = 0; r < num_rows; r++) {
        const int64_t at = (first_row + r) * w->blocks + block, group = at / OM_NESTED;
        steps->first[r] = w->nested_scales[group];
        steps->second[r] = w->nested_scales[group < last ? group + 1 : group];
        steps->crossing[r] = (int32_t)((group + 1) * OM_NESTED - at);
    }
}

OM_INLINE const uint8_t *om_panel_scales(const om_weights *w, int64_t first_row) {
    return w->scales + first_row * w->blocks * OM_GROUPS(w->codec) * OM_SCALE_BYTES(w->codec);
}

/* What a row's total is multiplied by at last. */
OM_INLINE float om_panel_unit(const int codec) {
    return codec == OM_NF4 ? 1.0f / OM_NF4_UNIT : codec == OM_MXFP4 ? 1.0f / OM_MXFP4_UNIT : 1.0f;
}

#endif
