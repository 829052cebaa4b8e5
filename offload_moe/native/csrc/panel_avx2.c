/* AVX2 with FMA. */
#include "panel.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "panel_256.h"

const om_panel_set om_panels_avx2 = OM_PANEL_TABLE;
#endif
