/* Quantization, bit-identical to bitsandbytes' CPU path: nf4 codes and absmax, then the nested 8-bit absmax; int8. */
#include "job.h"

#include <math.h>

#define UNIT_BLOCKS 512
#define NESTED_BLOCK 256

typedef struct {
    const void *values;
    int64_t num_blocks;
    int32_t dtype;
    uint8_t *codes;
    float *absmax;
    int is_int8;
} encode_job;

static void load_block(const encode_job *job, int64_t block, float *out) {
    const int64_t first = block * OM_BLOCK;
    if (job->dtype == OM_F32)
        __builtin_memcpy(out, (const float *)job->values + first, OM_BLOCK * sizeof(float));
    else
        for (int i = 0; i < OM_BLOCK; i++) out[i] = om_bf16_to_float(((const uint16_t *)job->values)[first + i]);
}

static void encode_unit(void *context, int64_t unit, int64_t next, int thread) {
    const encode_job *job = context;
    const om_isa *isa = om_active_isa();
    const int64_t end = om_min((unit + 1) * UNIT_BLOCKS, job->num_blocks);
    float values[OM_BLOCK];
    (void)next, (void)thread;
    for (int64_t b = unit * UNIT_BLOCKS; b < end; b++) {
        load_block(job, b, values);
        job->absmax[b] = job->is_int8 ? isa->encode_int8_block(values, (int8_t *)job->codes + b * OM_BLOCK)
                                      : isa->encode_nf4_block(values, job->codes + b * OM_BLOCK / 2);
    }
}

static void encode(encode_job *job) {
    om_pool_begin();
    om_pool_run(encode_unit, job, om_divide_up(job->num_blocks, UNIT_BLOCKS));
    om_pool_end();
}

/* values: fp32 or bf16, num_blocks * 64 of them. codes: 32 bytes a block. absmax: one fp32 a block. */
OM_EXPORT void om_encode_nf4(const void *values, int32_t dtype, int64_t num_blocks, uint8_t *codes, float *absmax) {
    encode_job job = {.values = values, .dtype = dtype, .num_blocks = num_blocks, .codes = codes, .absmax = absmax};
    encode(&job);
}

/* codes: 64 bytes a block. scales: absmax / 127. */
OM_EXPORT void om_encode_int8(const void *values, int32_t dtype, int64_t num_blocks, int8_t *codes, float *scales) {
    encode_job job = {.values = values, .dtype = dtype, .num_blocks = num_blocks, .codes = (uint8_t *)codes,
                      .absmax = scales, .is_int8 = 1};
    encode(&job);
}

/* bitsandbytes rounds to a grid of 65536 points first and takes the map's entry nearest to the point. */
#define GRID 65536
static uint8_t grid_codes[GRID];

__attribute__((constructor)) static void fill_grid(void) {
    int code = 0;
    for (int i = 0; i < GRID; i++) {
        const float point = -1.0f + (2.0f * (float)i) / (GRID - 1);
        while (code < 255 && 0.5f * (om_dynamic_map[code] + om_dynamic_map[code + 1]) < point) code++;
        grid_codes[i] = (uint8_t)code;
    }
}

static uint8_t nested_code(float value) {
    const float raised = value > -1.0f ? value : -1.0f; /* a NaN too */
    const float clamped = raised < 1.0f ? raised : 1.0f;
    return grid_codes[(int)((clamped + 1.0f) * 0.5f * (GRID - 1) + 0.5f)];
}

/* absmax minus offset -> 8-bit codes with a scale per 256. */
OM_EXPORT void om_encode_nested(const float *absmax, float offset, int64_t count, uint8_t *codes, float *scales) {
    for (int64_t first = 0; first < count; first += NESTED_BLOCK) {
        const int64_t end = om_min(first + NESTED_BLOCK, count);
        float largest = 0.0f;
        for (int64_t i = first; i < end; i++) largest = fmaxf(largest, fabsf(absmax[i] - offset));
        scales[first / NESTED_BLOCK] = largest;
        const float inverse = 1.0f / largest;
        for (int64_t i = first; i < end; i++) codes[i] = largest == 0.0f ? 0 : nested_code((absmax[i] - offset) * inverse);
    }
}
