/* The same source in its EVEX form: for processors with AVX-512 that clock lower where 512 bits are in use, and for machines
 * without AVX-VNNI that check it. */
#include "panel.h"

#if defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define OM_DOT _mm256_dpbusd_epi32
#include "panel_256.h"

const om_panel_set om_panels_avx512_vl = OM_PANEL_TABLE;
#endif
