/* Activations of several tokens for the panels of one matrix, and what a call needs to make tiles of them. */
#ifndef OM_PANEL_INPUTS_H
#define OM_PANEL_INPUTS_H

#include "panel.h"

typedef struct {
    int32_t codec;
    int has_quants, has_values;
    int64_t cols, blocks, groups, num_corrections; /* of a token */
    float *values; /* [blocks * 64] of a token, where a matrix of plain numbers takes them */
    int8_t *quants;
    float *scales;
    int32_t *corrections;
} om_panel_inputs;

/* The inputs, zeros at first, will have the form that this matrix takes too. Matrices of one input have one codec, or are GGUF's. */
void om_take_inputs_for(om_panel_inputs *inputs, const om_matrix *matrix);
/* Takes memory for `num_tokens` tokens. */
void om_lay_out_panel_inputs(om_panel_inputs *inputs, int64_t num_tokens, uintptr_t *cursor);
/* `values`: of these blocks, padded with zeros. */
void om_quantize_input(const om_panel_inputs *inputs, int64_t token, const float *values, int64_t first_block, int64_t num_blocks);
/* One row of x, fp32 or bf16; `buffer` holds 64 floats per block. */
void om_quantize_row(const om_panel_inputs *inputs, int64_t token, const void *x, int32_t dtype, float *buffer);
int64_t om_panel_tile_bytes(const om_panel_inputs *inputs); /* scratch for a tile of OM_TILE tokens, a multiple of 64 */
/* token_ids[first..first + num_tokens), or consecutive tokens where it is NULL. One token is read in place. */
om_panel_tile om_gather_panel_tile(const om_panel_inputs *inputs, const int32_t *token_ids, int64_t first, int num_tokens,
                                   uint8_t *scratch);

#endif
