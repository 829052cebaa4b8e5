/* AVX-VNNI: 256-bit dot products in their VEX form (Alder Lake, Zen 5 and later), where the compiler has them. */
#include "panel.h"

#if defined(__AVXVNNI__)
#define OM_DOT _mm256_dpbusd_avx_epi32
#include "panel_256.h"

const om_panel_set om_panels_avx_vnni = OM_PANEL_TABLE;
#elif defined(__x86_64__)
const om_panel_set om_panels_avx_vnni = {{0}, 0, 0};
#endif
