/* Shared by the translation units.
 *
 * Shape legend: T tokens, O output rows, K input columns, P columns padded to 64, B blocks of 64 columns in a row.
 * One kernel set per instruction set (`om_isa`); everything outside of it is plain C, independent of the vector width. */
#ifndef OM_KERNELS_H
#define OM_KERNELS_H

#include <stddef.h>
#include <pthread.h>
#include <stdint.h>

#if defined(__GNUC__)
#ifdef _WIN32
#define OM_EXPORT __declspec(dllexport)
#else
#define OM_EXPORT __attribute__((visibility("default")))
#endif
#define OM_INLINE static inline __attribute__((always_inline))
#define OM_APART __attribute__((noinline)) /* keeps its operations between what surrounds the call */
#define OM_PREFETCH(address) __builtin_prefetch((const void *)(address), 0, 3)
#else
#define OM_EXPORT
#define OM_INLINE static inline
#define OM_APART
#define OM_PREFETCH(address) ((void)0)
#endif

#include "api.h"

#define OM_IS_GGUF(codec) ((codec) >= OM_Q4_0)
#define OM_ARE_VALUES(codec) ((codec) >= OM_BF16 && (codec) <= OM_FP16) /* no codes: rows without padding or scales */
#define OM_NUM_VALUE_CODECS 3
#define OM_TILE 8        /* tokens that one pass over a row's codes serves */
_Static_assert(OM_MAX_ROWS <= OM_TILE, "the rows of a call are one tile");
#define OM_PREFETCH_BYTES 4096 /* bandwidth times latency is 4 to 8 KiB a core; twice that, as rows of scales lie between */

/* The same matrix in memory. */
typedef struct {
    const uint8_t *codes;
    const uint8_t *scales;
    const float *nested_scales;
    const uint8_t *bias;
    const uint8_t *next_codes; /* the codes that the thread reads after these rows; NULL if open */
    float nested_offset;
    int64_t rows, cols, blocks, row_bytes;
    int32_t codec, bias_dtype;
} om_weights;

/* Values of 1, 2, 4 or 8 tokens (`om_tile_stride`), in the order of the set's units; the last one is repeated to fill it. */
typedef struct {
    const float *values[OM_TILE];
    int num_tokens;
} om_tile;

typedef struct om_panel_set om_panel_set;   /* `panel.h` */
typedef struct om_vector_set om_vector_set; /* `vector.h` */

/* results[row * OM_TILE + token] */
typedef void (*om_rows_fn)(const om_weights *weights, int64_t first_row, int64_t num_rows, const om_tile *tile, float *results);

typedef struct {
    const char *name;
    om_rows_fn rows[3]; /* [codec], of matrices in row order; of plain numbers see `om_rows_of` */
    int unit_blocks;    /* blocks that are packed together where codes have 4 bits */
    /* The values of a token, from block `first_block` on, into the order of units. */
    void (*pack_blocks)(int32_t codec, const float *values, int64_t first_block, int64_t num_blocks, float *packed);
    void (*activate)(int32_t activation, float alpha, float limit, int has_gate, const float *gate, const float *up,
                     float *result, int64_t count);
    /* 64 values -> 32 packed bytes, returns absmax; 64 values -> 64 codes, returns absmax / 127. */
    float (*encode_nf4_block)(const float *values, uint8_t *codes);
    float (*encode_int8_block)(const float *values, int8_t *codes);
    /* The same by least error, weighed by weights[64]: `scale_search.h`. */
    float (*search_nf4_scale)(const float *values, const float *weights);
    int (*choose_nf4_scale)(const float *values, const float *weights, const float *scales, int count, uint8_t *codes);
    float (*search_int8_block)(const float *values, const float *weights, int8_t *codes);
    void (*feed_back_nf4_tile)(float *values, const float *scales, const float *feedback, int64_t stride, uint8_t *codes);
    const om_panel_set *panels;
    const om_vector_set *vectors;
} om_isa;

extern const om_isa om_isa_portable;
extern const om_isa om_isa_avx2;
extern const om_isa om_isa_avx_vnni;
extern const om_isa om_isa_avx512;
extern const om_isa om_isa_avx512_vl;
extern const om_isa om_isa_avx512_vbmi;
extern const om_isa om_isa_neon;

extern const float om_nf4_values[16];
extern const float om_dynamic_map[256];

const om_isa *om_active_isa(void);
om_rows_fn om_rows_of(int32_t codec); /* in row order */

/* Thread pool: `unit` runs once for each number below `num_units`, on any thread; returns when all have.
 * `next_unit` is what the thread runs afterwards, -1 where that is open. */
typedef void (*om_unit_fn)(void *context, int64_t unit, int64_t next_unit, int thread);
void om_pool_begin(void); /* one job at a time: hold this around a call's phases */
void om_pool_end(void);
void om_pool_run(om_unit_fn unit, void *context, int64_t num_units);
void om_pool_place_caller(pthread_t thread); /* pins a thread that makes such calls, as the caller is */
void om_pool_place_anywhere(pthread_t thread);
int om_pool_threads(void);
uint8_t *om_arena_reserve(size_t num_bytes); /* 64-byte aligned, valid until the next call; only between begin and end */

om_weights om_resolve(const om_matrix *matrix, const uint8_t *record);

OM_INLINE int om_tile_stride(int num_tokens) { return num_tokens <= 2 ? num_tokens : num_tokens <= 4 ? 4 : OM_TILE; }

OM_INLINE float om_bf16_to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
}

/* Exactly, subnormal ones included. */
OM_INLINE float om_fp16_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
    if (exponent == 0) {
        const float value = (float)fraction * 0x1p-24f;
        __builtin_memcpy(&bits, &value, sizeof bits);
        bits |= sign;
    } else if (exponent == 31) {
        bits = sign | 0x7f800000u | fraction << 13;
    }
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

/* Round to nearest even; a NaN stays a NaN. */
OM_INLINE uint16_t om_float_to_bf16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* E8M0: 2^(byte - 127); 255 is NaN, 0 is a subnormal power. */
OM_INLINE float om_e8m0(uint8_t exponent) {
    uint32_t bits = exponent == 255 ? 0x7fc00000u : exponent ? (uint32_t)exponent << 23 : 0x00400000u;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

/* For experts whose inputs are scaled: each pair gets a row of its own, weight * x[row], and the weight 1. `own_rows` may be
 * `row_ids`. */
void om_scale_inputs(const float *x, int64_t hidden, const int32_t *row_ids, int64_t num_pairs, float *weights, int32_t *own_rows,
                     float *scaled);

#endif
