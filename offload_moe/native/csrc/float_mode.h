/* Subnormal numbers count, and results round to nearest even, whatever the calling thread has set. */
#ifndef OM_FLOAT_MODE_H
#define OM_FLOAT_MODE_H

#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>

#define OM_OTHER_FLOAT_MODE 0xe040u /* FTZ, both bits of the rounding mode, DAZ */
static inline uint64_t om_read_float_mode(void) { return _mm_getcsr(); }
static inline void om_write_float_mode(uint64_t mode) { _mm_setcsr((unsigned)mode); }
#elif defined(__aarch64__)
#define OM_OTHER_FLOAT_MODE 0x01c80000u /* FZ, RMode, FZ16 of FPCR */
static inline uint64_t om_read_float_mode(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
static inline void om_write_float_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
#define OM_OTHER_FLOAT_MODE 0u
static inline uint64_t om_read_float_mode(void) { return 0; }
static inline void om_write_float_mode(uint64_t mode) { (void)mode; }
#endif

/* Returns the mode to restore. */
static inline uint64_t om_enter_float_mode(void) {
    const uint64_t mode = om_read_float_mode();
    if (mode & OM_OTHER_FLOAT_MODE) om_write_float_mode(mode & ~(uint64_t)OM_OTHER_FLOAT_MODE);
    return mode;
}

static inline void om_restore_float_mode(uint64_t mode) {
    if (mode & OM_OTHER_FLOAT_MODE) om_write_float_mode(mode);
}

#endif
