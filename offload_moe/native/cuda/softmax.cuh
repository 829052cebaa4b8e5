/* The parts of a softmax that a warp computes. */
#ifndef OM_SOFTMAX_CUH
#define OM_SOFTMAX_CUH

#include "common.cuh"

#define OM_LEAST __uint_as_float(0xff800000u)    /* -infinity */
#define OM_GREATEST __uint_as_float(0x7f800000u) /* infinity */

/* What follows from it is not computed ahead of a loop and kept in registers, which other parts of the loop need. */
OM_DEVICE int thread_of_now() {
    int thread = threadIdx.x;
#ifndef OM_SHIM
    asm volatile("" : "+r"(thread));
#endif
    return thread;
}

/* For all threads of a warp. A NaN is never the greatest. */
OM_DEVICE float greatest_of_warp(const float *values, int count) {
    float most = OM_LEAST;
    for (int i = thread_of_now() % 32; i < count; i += 32) most = values[i] > most ? values[i] : most;
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        const float other = __shfl_xor_sync(OM_WARP, most, d);
        most = other > most ? other : most;
    }
    return most;
}

/* In 16 lanes by place, for all threads of a warp. */
OM_DEVICE float sum_of_warp(const float *values, int count) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = thread_of_now() % 16; i < count; i += 16) sum = __fadd_rn(sum, values[i]);
    return sum_of_lanes(sum);
}

#endif
