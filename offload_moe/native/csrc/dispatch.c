/* The choice of a kernel set: the best one that the machine runs, or the one named. */
#include "cpu.h"
#include "panel_values.h"
#include "vector_set.h"

#include <string.h>

static const om_isa *active;

static const om_isa *find(const char *name) {
    const int is_any = name[0] == '\0';
#if defined(__x86_64__)
    if ((is_any || strcmp(name, "avx512vbmi") == 0) && om_cpu_has(OM_CPU_AVX512_VBMI)) return &om_isa_avx512_vbmi;
    if ((is_any || strcmp(name, "avx512") == 0) && om_cpu_has(OM_CPU_AVX512)) return &om_isa_avx512;
    if (strcmp(name, "avx512vl") == 0 && om_cpu_has(OM_CPU_AVX512)) return &om_isa_avx512_vl;
    if ((is_any || strcmp(name, "avxvnni") == 0) && om_cpu_has(OM_CPU_AVX_VNNI) && om_panels_avx_vnni.rows[0] != NULL)
        return &om_isa_avx_vnni;
    if ((is_any || strcmp(name, "avx2") == 0) && om_cpu_has(OM_CPU_AVX2)) return &om_isa_avx2;
#elif defined(__aarch64__)
    if (is_any || strcmp(name, "neon") == 0) return &om_isa_neon;
#endif
    return is_any || strcmp(name, "portable") == 0 ? &om_isa_portable : NULL;
}

const om_isa *om_active_isa(void) { return active != NULL ? active : (active = find("")); }

om_rows_fn om_rows_of(int32_t codec) {
    const om_isa *isa = om_active_isa();
    return OM_ARE_VALUES(codec) ? isa->vectors->value_rows[codec - OM_BF16] : isa->rows[codec];
}

om_panel_fn om_panels_of(int32_t codec) { return OM_ARE_VALUES(codec) ? om_value_panels : om_active_isa()->panels->rows[codec]; }

/* "" for the best. Returns 0, or -1 when this build or machine cannot run it. Not while a call is in progress. */
OM_EXPORT int om_select(const char *name) {
    const om_isa *found = find(name);
    if (found == NULL) return -1;
    active = found;
    return 0;
}

OM_EXPORT const char *om_active_name(void) { return om_active_isa()->name; }
