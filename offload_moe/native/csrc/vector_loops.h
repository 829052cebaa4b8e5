/* What a set of vectors computes; included once per instruction set, after its primitives. */
#include "sums.h"
#include "attend.h"

#define OM_VECTOR_TABLE {attend, merge_sections, dot, rms_norm, exponentials, sigmoids}
