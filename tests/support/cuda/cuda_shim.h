/* CUDA C++ on a CPU, to be tested: include it before a kernel's text and compile that with g++ (`tests/support/cuda/shim.py`).
 *
 * It has what our kernels use and no more; see `fibers.h` for how threads run. Conversions of floats saturate and give 0 for
 * NaN, as a card's do. Compile with -ffp-contract=off. */
#pragma once
#include "fibers.h"
#include <cmath>

#define OM_SHIM 1
#define __global__ __attribute__((visibility("default"), used, noinline))
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shim_shared"))) /* one block at a time */
#define threadIdx shim::thread_index
#define blockIdx shim::block_index
#define blockDim shim::block
#define gridDim shim::grid
#define warpSize 32
#define __syncthreads() shim::barrier(__LINE__)
#define __threadfence_block shim::trace_fence
#define __threadfence shim::trace_fence
#define __threadfence_system shim::trace_fence

struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline unsigned shim_lane() { return shim::self->index & 31; }
template <class T> T __shfl_sync(unsigned mask, T v, int lane) { return shim::shuffle(mask, v, (unsigned)lane); }
template <class T> T __shfl_xor_sync(unsigned mask, T v, int d) { return shim::shuffle(mask, v, shim_lane() ^ (unsigned)d); }
template <class T> T __shfl_down_sync(unsigned mask, T v, int d) {
    const unsigned from = shim_lane() + (unsigned)d;
    return shim::shuffle(mask, v, from < 32 ? from : shim_lane());
}
template <class T> T __shfl_up_sync(unsigned mask, T v, int d) {
    const unsigned lane = shim_lane();
    return shim::shuffle(mask, v, lane < (unsigned)d ? lane : lane - (unsigned)d);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned votes = predicate ? 1u << shim_lane() : 0;
    for (int d = 16; d; d >>= 1) votes |= __shfl_xor_sync(mask, votes, d);
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::warp_barrier(mask); }
#define __syncthreads_or(predicate) shim::any_of_block(predicate, __LINE__)
namespace shim {
/* It is set between two barriers, so that no thread is still at the last one or already at the next. */
inline int any_of_block(int predicate, int line) {
    static int votes;
    barrier(line);
    votes = 0;
    barrier(line);
    if (predicate) votes = 1;
    barrier(line);
    return votes;
}
} // namespace shim

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> void __stcs(T *p, T v) { *p = v; }

/* Relaxed, as on a card: they order nothing but themselves. */
#define SHIM_ATOMIC(name, parameters, ...) \
    template <class T> SHIM_QUIET T name parameters { \
        shim::trace_atomic(p, sizeof *p); \
        const T old = *p; \
        *p = __VA_ARGS__; \
        return old; \
    }
SHIM_ATOMIC(atomicAdd, (T *p, T v), old + v)
SHIM_ATOMIC(atomicExch, (T *p, T v), v)
SHIM_ATOMIC(atomicOr, (T *p, T v), old | v)
SHIM_ATOMIC(atomicMax, (T *p, T v), old < v ? v : old)
SHIM_ATOMIC(atomicMin, (T *p, T v), v < old ? v : old)
SHIM_ATOMIC(atomicCAS, (T *p, T expected, T v), old == expected ? v : old)

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __int2float_rn(int a) { return (float)a; }
inline float __uint2float_rn(unsigned a) { return (float)a; }
inline unsigned __float_as_uint(float a) { unsigned u; __builtin_memcpy(&u, &a, 4); return u; }
inline int __float_as_int(float a) { int u; __builtin_memcpy(&u, &a, 4); return u; }
inline float __uint_as_float(unsigned a) { float f; __builtin_memcpy(&f, &a, 4); return f; }
inline float __int_as_float(int a) { float f; __builtin_memcpy(&f, &a, 4); return f; }
inline int __float2int_rn(float v) {
    if (v != v) return 0;
    return v >= 0x1p31f ? 0x7fffffff : v < -0x1p31f ? (int)0x80000000u : (int)std::nearbyint(v);
}
inline int __float2int_rz(float v) {
    if (v != v) return 0;
    return v >= 0x1p31f ? 0x7fffffff : v < -0x1p31f ? (int)0x80000000u : (int)v;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
/* PTX prmt in its default mode: bit 3 of a selector replicates the byte's sign. */
inline unsigned shim_prmt(unsigned x, unsigned y, unsigned s) {
    const uint64_t bytes = (uint64_t)y << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned n = s >> 4 * i & 15, byte = (unsigned)(bytes >> 8 * (n & 7)) & 255;
        out |= (n & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return out;
}
/* A number in fp16, exactly. */
inline float shim_from_half(unsigned bits) {
    const unsigned sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * (float)fraction;
    return __uint_as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) { return shim_prmt(x, y, s & 0x7777); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
    return c;
}
inline int __dp4a(unsigned a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (uint8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
    return c;
}
