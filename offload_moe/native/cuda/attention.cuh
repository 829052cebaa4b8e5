/* Attention and routers on the card. A program that includes this file has one line for each kernel that a model needs:
 *
 *   OM_DEFINE_HEADS(name, num_heads, num_kv_heads, head_dim, rotated_dims, rotation, norm_span)
 *   OM_DEFINE_ABSORB(name, codec, num_heads, unrotated_dims, rotated_dims, value_dims, rank, rotation, R)
 *   OM_DEFINE_ATTEND(name, num_heads, num_kv_heads, dim, more_dim, value_dim)    latents: one head of keys, dim and value_dim
 *                                                                               are the rank, more_dim the rotated dims
 *   OM_DEFINE_MERGE(name, num_heads, value_dim)
 *   OM_DEFINE_EXPAND(name, codec, num_heads, unrotated_dims, value_dims, rank, R)
 *   OM_DEFINE_DELTA(name, num_key_heads, num_shared, key_dim, value_dim, taps)    num_shared: heads of values for each of keys
 *   OM_DEFINE_ROUTE(name, num_experts, top_k, num_groups, num_chosen_groups, num_best, is_sigmoid, is_of_chosen)
 *
 * Each makes `extern "C" __global__ void name(const om_card_..._params p)`; `params_attention.h` has parameters and launches.
 * rotation: OM_HALVES, OM_PAIRS_TO_HALVES or OM_PAIRS; with 0 rotated dims nothing rotates. norm_span: OM_NO_NORM,
 * OM_NORM_OF_HEAD or OM_NORM_OF_ALL. codec of the expansion: OM_BF16 or OM_FP32. The logits of a router are OM_DEFINE_VALUES of
 * `kernels.cuh`. */
#include "absorb.cuh"
#include "attend.cuh"
#include "delta.cuh"
#include "heads.cuh"
#include "merge.cuh"
#include "route.cuh"
