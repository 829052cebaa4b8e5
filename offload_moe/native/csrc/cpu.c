/* Uses cpuid directly: `__builtin_cpu_supports` needs the compiler's runtime library, and zig's has an `expf` with other bits
 * than the system's. */
#include "cpu.h"

/* Bytes. Share of a plain read's rate on Zen 5, one prefetch beside each line: Q4_K 0.77 to 0.81 at 4096, 0.88 to 0.94 at 6144,
 * 0.89 to 0.96 at 7168, 0.92 to 0.96 at 8192. Q6_K and nf4 are alike; int8 and Q8_0 are best at 6144. */
#define AHEAD 7168

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdatomic.h>

#define KNOWN (1 << 30)
#define HAS_ALL(word, bits) (((word) & (bits)) == (bits))

enum { SSE41_PCLMUL = 1u << 19 | 1u << 1, FMA_F16C = 1u << 12 | 1u << 29, OSXSAVE = 1u << 27 };              /* leaf 1, ecx */
enum { AVX2 = 1u << 5, AVX512F_DQ_CD_BW = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 };      /* leaf 7, ebx */
#define AVX512VL (1u << 31)
enum { AVX512_VBMI = 1u << 1, AVX512_VNNI = 1u << 11 };                                     /* leaf 7, ecx */
enum { AVX_VNNI = 1u << 4 };                                                                /* leaf 7.1, eax */
enum { YMM_STATE = 0x6, ZMM_STATE = 0xe6 };                                                 /* kept by the system: xcr0 */

static unsigned kept_states(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int detect(void) {
    unsigned eax, ebx, ecx, edx, ebx7 = 0, ecx7 = 0;
    int found = KNOWN;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
    if (HAS_ALL(ecx, SSE41_PCLMUL)) found |= OM_CPU_PCLMUL;
    if (!HAS_ALL(ecx, OSXSAVE) || !__get_cpuid_count(7, 0, &eax, &ebx7, &ecx7, &edx)) return found;
    const unsigned states = kept_states();
    if (HAS_ALL(states, YMM_STATE) && HAS_ALL(ecx, FMA_F16C) && HAS_ALL(ebx7, AVX2)) found |= OM_CPU_AVX2;
    if (!(found & OM_CPU_AVX2)) return found;
    if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && HAS_ALL(eax, AVX_VNNI)) found |= OM_CPU_AVX_VNNI;
    if (!HAS_ALL(states, ZMM_STATE)) return found;
    if (!HAS_ALL(ebx7, AVX512F_DQ_CD_BW | AVX512VL) || !HAS_ALL(ecx7, AVX512_VNNI)) return found;
    found |= OM_CPU_AVX512;
    if (HAS_ALL(ecx7, AVX512_VBMI)) found |= OM_CPU_AVX512_VBMI;
    return found;
}

int om_cpu_has(int feature) {
    static _Atomic int found;
    if (!found) found = detect();
    return (found & feature) != 0;
}

/* AMD's family 25: with prefetches 4096 bytes ahead, Zen 4 reads panels for one token at 0.74 to 0.85 of a plain read, without at
 * 0.93 to 1.0. Zen 5 without: 0.46 to 0.92. */
static int detect_ahead(void) {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx) || ebx != signature_AMD_ebx || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return AHEAD;
    const unsigned family = (eax >> 8 & 15) + (eax >> 20 & 255);
    return family == 25 ? -1 : AHEAD;
}

int om_panel_ahead(int num_tokens) {
    static _Atomic int found;
    if (!found) found = detect_ahead();
    return found > 0 || num_tokens > 2 ? AHEAD : 0;
}
#else
int om_panel_ahead(int num_tokens) { return (void)num_tokens, AHEAD; }
#endif
