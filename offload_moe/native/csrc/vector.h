/* Loops over vectors of 16 lanes are written once: on every machine sums have 16 lanes.
 *
 * An instruction set defines, before it includes `vector_loops.h`:
 *   vec                  16 floats; vec_load, vec_load_bf16, vec_load_fp16, vec_store, vec_broadcast, vec_add, vec_mul,
 *                        vec_fma(a, b, c) = a * b + c
 *   vec_greater(a, b)    a where it is greater, else b, so also where one is NaN
 *   vec_sum              of all lanes: j and j + 8, then 4, 2, 1; vec_sums: those of four vectors
 *   OM_HEADS             heads that share a row of a cache and are computed together: 4, 2 or 1
 *   OM_AT_ONCE(heads)    rows, or vectors of a row, beside each other: as many sums as the registers hold */
#ifndef OM_VECTOR_H
#define OM_VECTOR_H

#include "arithmetic.h"
#include "vector_set.h"

#include <math.h>

#define OM_LANES 16
#define OM_UNROLL _Pragma("GCC unroll 16") /* sums stay in registers only where their indices are constants */

#endif
