/* Matrices of plain numbers beside matrices in panels: they stay in row order, and their activations in fp32. */
#ifndef OM_PANEL_VALUES_H
#define OM_PANEL_VALUES_H

#include "panel.h"

/* An `om_panel_fn`, with the numbers of `om_rows_of`. */
void om_value_panels(const om_weights *w, int64_t first_row, int64_t num_rows, const om_panel_tile *tile, float *results, int64_t stride);

#endif
