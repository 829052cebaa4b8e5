/* What the processor and the system run, on x86-64. */
#ifndef OM_CPU_H
#define OM_CPU_H

/* OM_CPU_AVX2: with FMA; OM_CPU_AVX_VNNI: beside it. OM_CPU_AVX512: with all that `isa_avx512.c` is compiled for. */
enum { OM_CPU_PCLMUL = 1, OM_CPU_AVX2 = 2, OM_CPU_AVX512 = 4, OM_CPU_AVX512_VBMI = 8, OM_CPU_AVX_VNNI = 16 };

int om_cpu_has(int feature);

#endif
