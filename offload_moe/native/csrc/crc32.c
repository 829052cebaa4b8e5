/* zlib's CRC-32 at the speed of memory, so that checking a record costs a fraction of reading it.
 *
 * Source: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009, the
 * bit-reflected constants of its section 5; carry-less products fold 64 bytes a step. */
#include "cpu.h"
#include "om_kernels.h"

#define POLYNOMIAL 0xEDB88320u

typedef uint32_t crc_tables[8][256];

static const crc_tables *tables(void) {
    static crc_tables made;
    static int is_made; /* two threads that make it at once write the same numbers */
    if (__atomic_load_n(&is_made, __ATOMIC_ACQUIRE)) return &made;
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (POLYNOMIAL & (0u - (crc & 1)));
        made[0][byte] = crc;
    }
    for (int step = 1; step < 8; step++)
        for (int byte = 0; byte < 256; byte++)
            made[step][byte] = made[step - 1][byte] >> 8 ^ made[0][made[step - 1][byte] & 255];
    __atomic_store_n(&is_made, 1, __ATOMIC_RELEASE);
    return &made;
}

static uint32_t by_tables(const uint8_t *data, int64_t length, uint32_t crc) {
    const uint32_t(*t)[256] = *tables();
    for (; length >= 8; data += 8, length -= 8) {
        const uint32_t low = crc ^ (data[0] | data[1] << 8 | data[2] << 16 | (uint32_t)data[3] << 24);
        crc = t[7][low & 255] ^ t[6][low >> 8 & 255] ^ t[5][low >> 16 & 255] ^ t[4][low >> 24] ^ t[3][data[4]] ^
              t[2][data[5]] ^ t[1][data[6]] ^ t[0][data[7]];
    }
    for (; length > 0; data++, length--) crc = t[0][(crc ^ *data) & 255] ^ crc >> 8;
    return crc;
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define CARRYLESS __attribute__((target("pclmul,sse4.1")))

CARRYLESS static inline __m128i fold(__m128i folded, __m128i constants, __m128i next) {
    const __m128i low = _mm_clmulepi64_si128(folded, constants, 0x00);
    const __m128i high = _mm_clmulepi64_si128(folded, constants, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

CARRYLESS static inline __m128i load(const uint8_t *data) { return _mm_loadu_si128((const __m128i *)data); }

/* length: a multiple of 16, at least 64. */
CARRYLESS static uint32_t by_products(const uint8_t *data, int64_t length, uint32_t crc) {
    const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128((int)crc));
    __m128i b = load(data + 16), c = load(data + 32), d = load(data + 48);
    for (data += 64, length -= 64; length >= 64; data += 64, length -= 64) {
        _mm_prefetch((const char *)data + 1024, _MM_HINT_T0);
        a = fold(a, by_64, load(data));
        b = fold(b, by_64, load(data + 16));
        c = fold(c, by_64, load(data + 32));
        d = fold(d, by_64, load(data + 48));
    }
    a = fold(fold(fold(a, by_16, b), by_16, c), by_16, d);
    for (; length >= 16; data += 16, length -= 16) a = fold(a, by_16, load(data));
    /* 128 bits -> 96 -> 64 -> 32, the last by Barrett reduction. */
    const __m128i low_32 = _mm_setr_epi32(~0, 0, ~0, 0);
    a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by_16, 0x10));
    __m128i rest = _mm_srli_si128(a, 4);
    a = _mm_clmulepi64_si128(_mm_and_si128(a, low_32), _mm_set_epi64x(0, 0x0163cd6124), 0x00);
    a = _mm_xor_si128(a, rest);
    const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(a, low_32), barrett, 0x10);
    quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_32), barrett, 0x00);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(a, quotient), 1);
}
#endif

/* Continue from `crc`, which is 0 at the beginning. */
OM_EXPORT uint32_t om_crc32(const uint8_t *data, int64_t length, uint32_t crc) {
    crc = ~crc;
#if defined(__x86_64__) && defined(__GNUC__)
    if (length >= 64 && om_cpu_has(OM_CPU_PCLMUL)) {
        const int64_t whole = length & ~(int64_t)15;
        crc = by_products(data, whole, crc);
        data += whole;
        length -= whole;
    }
#endif
    return ~by_tables(data, length, crc);
}
