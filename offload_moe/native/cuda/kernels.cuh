/* The card's kernels. A program includes this file and has one line for each kernel that a model needs, with its sizes:
 *
 *   OM_DEFINE_NORM(name, hidden)
 *   OM_DEFINE_QUANTIZE(name, cols)
 *   OM_DEFINE_LINEAR(name, codec, cols, R)         matrices in panels: OM_NF4, OM_INT8, OM_MXFP4,
 *                                                OM_Q8_0, OM_GGUF_MXFP4, OM_Q4_K, OM_Q6_K
 *   OM_DEFINE_VALUES(name, codec, cols, R)         matrices of plain numbers: OM_BF16, OM_FP32
 *   OM_DEFINE_FIRST(name, codec, hidden, intermediate, R, activation, has_gate)
 *   OM_DEFINE_SECOND(name, codec, intermediate, hidden, R)
 *   OM_DEFINE_MLP_FIRST(name, codec, next_codec, hidden, intermediate, R, activation)
 *   OM_DEFINE_MLP_SECOND(name, codec, intermediate, hidden, R)
 *   OM_DEFINE_VALUES_FIRST(name, codec, hidden, intermediate, R, activation)   the same of plain numbers
 *   OM_DEFINE_VALUES_SECOND(name, codec, intermediate, hidden, R)
 *   OM_DEFINE_EMBED(name, codec, hidden)
 *   OM_DEFINE_GREATEST(name)
 *   OM_DEFINE_CHOOSE(name)
 *
 * Attention and routers: `attention.cuh`; residency: `residency.cuh`.
 *
 * Each makes `extern "C" __global__ void name(const om_card_..._params p)`; `params.h` has parameters and launches. */
#include "choose.cuh"
#include "embed.cuh"
#include "experts.cuh"
#include "linear.cuh"
#include "norm.cuh"
#include "values_mlp.cuh"
