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

/* The entry nearest to a value, the lower one of two that are equally near. Source: bitsandbytes, csrc/cpu_ops.cpp. */
static uint8_t nearest_dynamic(float value) {
    int low = 0, high = 256; /* the first entry that is not below the value */
    while (low < high) {
        const int middle = (low + high) / 2;
        if (om_dynamic_map[middle] < value)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0) return 0;
    if (low == 256) return 255;
    return (uint8_t)(value - om_dynamic_map[low - 1] <= om_dynamic_map[low] - value ? low - 1 : low);
}

/* absmax minus offset -> 8-bit codes with a scale per 256. */
OM_EXPORT void om_encode_nested(const float *absmax, float offset, int64_t count, uint8_t *codes, float *scales) {
    for (int64_t first = 0; first < count; first += NESTED_BLOCK) {
        const int64_t end = om_min(first + NESTED_BLOCK, count);
        float largest = 0.0f;
        for (int64_t i = first; i < end; i++) largest = fmaxf(largest, fabsf(absmax[i] - offset));
        scales[first / NESTED_BLOCK] = largest;
        const float inverse = 1.0f / largest;
        for (int64_t i = first; i < end; i++) codes[i] = nearest_dynamic((absmax[i] - offset) * inverse);
    }
}
