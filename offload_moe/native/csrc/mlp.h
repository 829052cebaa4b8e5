#ifndef OM_MLP_H
#define OM_MLP_H

#include "job.h"
#include "panel.h"

/* out[T, H] += weights[T] times the MLP of x[T, H]; few tokens. Returns 0, or -1 when memory is short. */
int om_mlp_add(const om_mlp *mlp, const float *x, int64_t num_tokens, const float *weights, float *out);

#endif
