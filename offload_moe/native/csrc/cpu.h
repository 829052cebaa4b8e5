/* Instruction sets that the processor and the system support, and how the processor reads memory. */
#ifndef OM_CPU_H
#define OM_CPU_H

/* OM_CPU_AVX2: with FMA; OM_CPU_AVX_VNNI: beside it. OM_CPU_AVX512: with all that `isa_avx512.c` is compiled for. */
enum { OM_CPU_PCLMUL = 1, OM_CPU_AVX2 = 2, OM_CPU_AVX512 = 4, OM_CPU_AVX512_VBMI = 8, OM_CPU_AVX_VNNI = 16 };

int om_cpu_has(int feature);
/* How far ahead of a panel's codes the next ones are prefetched for so many tokens; 0: the processor's own streams do better. */
int om_panel_ahead(int num_tokens);

#endif
