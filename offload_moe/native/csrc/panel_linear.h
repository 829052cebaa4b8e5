/* The part of a linear job that panels take (`linear.c` has the rest). */
#ifndef OM_PANEL_LINEAR_H
#define OM_PANEL_LINEAR_H

#include "job.h"

void om_lay_out_panel_linear(om_linear_job *job, uintptr_t *cursor);
void om_run_panel_linear(om_linear_job *job);

#endif
