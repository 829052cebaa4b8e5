/* Words, loads and the arithmetic of docs/decisions/064-one-arithmetic.md for the card. fp32 only by __f*_rn and IEEE division:
 * nothing is contracted or approximated. */
#ifndef OM_COMMON_CUH
#define OM_COMMON_CUH

#include "params.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define OM_DEVICE static __device__ __forceinline__
#define OM_KERNEL extern "C" __global__ void
#define OM_WARP 0xffffffffu

/* As in csrc/api.h; a test compares them. */
enum { OM_NF4 = 0, OM_INT8 = 1, OM_MXFP4 = 2, OM_BF16 = 3, OM_FP32 = 4 };
enum { OM_Q8_0 = 10, OM_GGUF_MXFP4 = 12, OM_Q4_K = 15, OM_Q6_K = 17 }; /* of GGUF's types those that have kernels */
enum { OM_F32 = 0, OM_BF16_VALUES = 1 };
enum { OM_SILU = 0, OM_GELU = 1, OM_GELU_TANH = 2, OM_GPT_OSS = 3, OM_RELU = 4, OM_RELU2 = 5, OM_IDENTITY = 6 };

/* Records are found through a table, so a compiler sees generic addresses, whose loads may alias shared memory and sink to
 * their uses: these are of global memory, and OM_ISSUE keeps the loads above it above it. */
#ifdef OM_SHIM
#define OM_ISSUE __syncwarp()
OM_DEVICE uint4 load_codes(const u8 *p) { return *(const uint4 *)p; }
OM_DEVICE uint4 load16(const void *p) { return *(const uint4 *)p; }
OM_DEVICE u32 load4(const void *p) { return *(const u32 *)p; }
OM_DEVICE u32 load2(const void *p) { return *(const u16 *)p; }
OM_DEVICE u32 load1(const void *p) { return *(const u8 *)p; }
OM_DEVICE uint2 load8(const void *p) { return *(const uint2 *)p; }
OM_DEVICE u32 prmt(u32 x, u32 y, u32 s) { return shim_prmt(x, y, s); }
OM_DEVICE float from_half(u32 bits) { return shim_from_half(bits); }
#else
#define OM_ISSUE asm volatile("bar.warp.sync 0xffffffff;" ::: "memory")
OM_DEVICE uint4 load_codes(const u8 *p) {
    uint4 w;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(p) : "memory");
    return w;
}
OM_DEVICE uint4 load16(const void *p) {
    uint4 w;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(p));
    return w;
}
OM_DEVICE u32 load4(const void *p) {
    u32 w;
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(w) : "l"(p));
    return w;
}
OM_DEVICE u32 load2(const void *p) {
    u16 w;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(w) : "l"(p));
    return w;
}
OM_DEVICE u32 load1(const void *p) {
    u32 w;
    asm("ld.global.nc.u8 %0, [%1];" : "=r"(w) : "l"(p));
    return w;
}
OM_DEVICE u32 prmt(u32 x, u32 y, u32 s) {
    u32 w;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(w) : "r"(x), "r"(y), "r"(s));
    return w;
}
OM_DEVICE uint2 load8(const void *p) {
    uint2 w;
    asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(w.x), "=r"(w.y) : "l"(p));
    return w;
}
/* The number whose fp16 bits are the lower ones of a word; exact. */
OM_DEVICE float from_half(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
    return value;
}
#endif

OM_DEVICE float load_float(const void *p) { return __uint_as_float(load4(p)); }
OM_DEVICE float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }

/* A number of a plane of plain numbers. */
OM_DEVICE float load_value(bool is_bf16, const void *plane, long long at) {
    return is_bf16 ? from_bf16(load2((const u16 *)plane + at)) : load_float((const float *)plane + at);
}

#define OM_MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds to the nearest even integer, for |x| < 2^22 */

OM_DEVICE float own_exp(float t) {
    t = t < -87.0f ? -87.0f : t;
    t = t > 88.0f ? 88.0f : t;
    const float shifted = __fadd_rn(__fmul_rn(t, 0x1.715476p+0f), OM_MAGIC), n = __fadd_rn(shifted, -OM_MAGIC);
    const float r = __fmaf_rn(n, 2.12194440e-4f, __fmaf_rn(n, -0.693359375f, t));
    float p = __fmaf_rn(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = __fmaf_rn(p, r, 8.3334519073e-3f);
    p = __fmaf_rn(p, r, 4.1665795894e-2f);
    p = __fmaf_rn(p, r, 1.6666665459e-1f);
    p = __fmaf_rn(p, r, 5.0000001201e-1f);
    p = __fadd_rn(__fmaf_rn(p, __fmul_rn(r, r), r), 1.0f);
    return __fmul_rn(p, __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u));
}

/* `om_log` of csrc/arithmetic.h, for finite positive numbers that are not subnormal. */
OM_DEVICE float own_log(float x) {
    const u32 bits = __float_as_uint(x);
    const float m = __uint_as_float((bits & 0x007fffffu) | 0x3f000000u); /* in [0.5, 1) */
    const bool is_small = m < 0.70710678118654752f;
    const float exponent = (float)((int)(bits >> 23) - 126 - (is_small ? 1 : 0));
    const float t = __fadd_rn(is_small ? __fadd_rn(m, m) : m, -1.0f), z = __fmul_rn(t, t);
    float p = __fmaf_rn(7.0376836292e-2f, t, -1.1514610310e-1f);
    p = __fmaf_rn(p, t, 1.1676998740e-1f);
    p = __fmaf_rn(p, t, -1.2420140846e-1f);
    p = __fmaf_rn(p, t, 1.4249322787e-1f);
    p = __fmaf_rn(p, t, -1.6668057665e-1f);
    p = __fmaf_rn(p, t, 2.0000714765e-1f);
    p = __fmaf_rn(p, t, -2.4999993993e-1f);
    p = __fmaf_rn(p, t, 3.3333331174e-1f);
    p = __fmul_rn(__fmul_rn(p, t), z);
    p = __fmaf_rn(-2.12194440e-4f, exponent, p);
    p = __fmaf_rn(-0.5f, z, p);
    return __fmaf_rn(0.693359375f, exponent, __fadd_rn(t, p));
}

/* a times the sigmoid of z. */
OM_DEVICE float over(float a, float z) { return __fdiv_rn(a, __fadd_rn(1.0f, own_exp(-z))); }

/* The normal distribution's cumulative function. */
OM_DEVICE float phi(float x) {
    const float size = __fmul_rn(x < 0.0f ? -x : x, 0.70710678118654752f), t = size > 5.5f ? 5.5f : size;
    float p = __fmaf_rn(0x1.b350acp-20f, t, -0x1.109b1cp-15f);
    p = __fmaf_rn(p, t, 0x1.04f330p-12f);
    p = __fmaf_rn(p, t, -0x1.93a61ep-11f);
    p = __fmaf_rn(p, t, -0x1.077846p-10f);
    p = __fmaf_rn(p, t, 0x1.479d96p-6f);
    p = __fmaf_rn(p, t, -0x1.a64b9ep-4f);
    p = __fmaf_rn(p, t, -0x1.45eb92p-1f);
    p = __fmaf_rn(p, t, -0x1.20ddacp+0f);
    const float tail = __fmul_rn(0.5f, own_exp(__fmul_rn(p, t)));
    return x < 0.0f ? tail : __fadd_rn(1.0f, -tail);
}

OM_DEVICE float gelu_tanh(float g) {
    const float cubed = __fmaf_rn(__fmul_rn(__fmul_rn(0.044715f, g), g), g, g);
    return over(g, __fmul_rn(1.5957691216057308f, cubed));
}

/* Of the gate, without its product with the up half. */
template <int ACTIVATION> OM_DEVICE float activation(float g) {
    if (ACTIVATION == OM_SILU) return over(g, g);
    if (ACTIVATION == OM_GELU) return __fmul_rn(g, phi(g));
    if (ACTIVATION == OM_GELU_TANH) return gelu_tanh(g);
    if (ACTIVATION == OM_RELU) return g < 0.0f ? 0.0f : g;
    if (ACTIVATION == OM_RELU2) return g < 0.0f ? 0.0f : __fmul_rn(g, g);
    return g;
}

OM_DEVICE float gpt_oss(float alpha, float limit, float gate, float up) {
    const float g = gate > limit ? limit : gate, low = up < -limit ? -limit : up, u = low > limit ? limit : low;
    return __fmul_rn(__fadd_rn(u, 1.0f), over(g, __fmul_rn(g, alpha)));
}

/* The lanes of a sum of 16, held by a warp twice: j and j + 8, then 4, 2, 1. */
OM_DEVICE float sum_of_lanes(float v) {
#pragma unroll
    for (int d = 8; d; d >>= 1) v = __fadd_rn(v, __shfl_xor_sync(OM_WARP, v, d));
    return v;
}

/* "Lanes of a * b", of one warp and a length of at least 1; both in memory of any kind. */
OM_DEVICE float dot_of_lanes(const float *a, const float *b, int length) {
    const int lane = threadIdx.x % 16, whole = length / 16 * 16;
    float sum = 0.0f;
#pragma unroll 8
    for (int i = lane; i < whole; i += 16) sum = __fmaf_rn(a[i], b[i], sum);
    if (whole < length) {
        const bool is_inside = whole + lane < length; /* the others add a product of zeros */
        sum = __fmaf_rn(is_inside ? a[whole + lane] : 0.0f, is_inside ? b[whole + lane] : 0.0f, sum);
    }
    return sum_of_lanes(sum);
}

#endif
