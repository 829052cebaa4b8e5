/* Quantization. By the greatest magnitude, bit-identical to bitsandbytes' CPU path: nf4 codes and absmax, then the nested 8-bit
 * absmax; int8. By least squared error: `scale_search.h`. */
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

static void load_block(const void *values, int32_t dtype, int64_t block, float *out) {
    const int64_t first = block * OM_BLOCK;
    if (dtype == OM_F32)
        __builtin_memcpy(out, (const float *)values + first, OM_BLOCK * sizeof(float));
    else
        for (int i = 0; i < OM_BLOCK; i++) out[i] = om_bf16_to_float(((const uint16_t *)values)[first + i]);
}

static void encode_unit(void *context, int64_t unit, int64_t next, int thread) {
    const encode_job *job = context;
    const om_isa *isa = om_active_isa();
    const int64_t end = om_min((unit + 1) * UNIT_BLOCKS, job->num_blocks);
    float values[OM_BLOCK];
    (void)next, (void)thread;
    for (int64_t b = unit * UNIT_BLOCKS; b < end; b++) {
        load_block(job->values, job->dtype, b, values);
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

typedef struct {
    const void *values;
    const float *importance; /* of each column, or NULL */
    int64_t num_blocks, row_blocks;
    int32_t dtype, is_int8;
    uint8_t *codes, *scale_codes;
    float *scales;
} search_job;

/* A column's importance, or 1. */
static const float *importance_of(const search_job *job, int64_t block, float *ones) {
    if (job->importance) return job->importance + block % job->row_blocks * OM_BLOCK;
    for (int i = 0; i < OM_BLOCK; i++) ones[i] = 1.0f;
    return ones;
}

/* The nearest code of a scale and its neighbours: the one that makes the block's error least, and the codes that go with it. */
static void search_nested(const search_job *job, int64_t block, const float *values, const float *weights, float scale,
                          float largest) {
    const int nearest = largest > 0.0f ? nested_code(scale / largest) : 127;
    const int nested[3] = {nearest, nearest > 0 ? nearest - 1 : nearest, nearest < 255 ? nearest + 1 : nearest};
    float scales[3];
    for (int n = 0; n < 3; n++) scales[n] = om_dynamic_map[nested[n]] * largest;
    uint8_t *codes = job->codes + block * OM_BLOCK / 2;
    job->scale_codes[block] = (uint8_t)nested[om_active_isa()->choose_nf4_scale(values, weights, scales, 3, codes)];
}

/* One group of blocks, whose scales share a scale. */
static void search_group(void *context, int64_t group, int64_t next, int thread) {
    const search_job *job = context;
    const om_isa *isa = om_active_isa();
    const int64_t first = group * NESTED_BLOCK, end = om_min(first + NESTED_BLOCK, job->num_blocks);
    float values[OM_BLOCK], ones[OM_BLOCK], scales[NESTED_BLOCK], largest = 0.0f;
    (void)next, (void)thread;
    for (int64_t b = first; b < end; b++) {
        load_block(job->values, job->dtype, b, values);
        const float *weights = importance_of(job, b, ones);
        if (job->is_int8) {
            job->scales[b] = isa->search_int8_block(values, weights, (int8_t *)job->codes + b * OM_BLOCK);
            continue;
        }
        const float scale = scales[b - first] = isa->search_nf4_scale(values, weights), magnitude = fabsf(scale);
        if (!(magnitude <= largest || isnan(largest))) largest = magnitude; /* a NaN wins */
    }
    if (job->is_int8) return;
    job->scales[group] = largest;
    for (int64_t b = first; b < end; b++) {
        load_block(job->values, job->dtype, b, values);
        search_nested(job, b, values, importance_of(job, b, ones), scales[b - first], largest);
    }
}

static void search(search_job *job) {
    om_pool_begin();
    om_pool_run(search_group, job, om_divide_up(job->num_blocks, NESTED_BLOCK));
    om_pool_end();
}

/* As om_encode_nf4, with signed scales of least error: their 8-bit codes, and one fp32 per 256 of them (NaN if a value is not
 * finite); the offset is 0. importance: of the row_blocks * 64 columns of a row, or NULL. */
OM_EXPORT void om_search_nf4(const void *values, int32_t dtype, int64_t num_blocks, int64_t row_blocks, const float *importance,
                             uint8_t *codes, uint8_t *scale_codes, float *scales) {
    search_job job = {.values = values, .dtype = dtype, .num_blocks = num_blocks, .row_blocks = row_blocks,
                      .importance = importance, .codes = codes, .scale_codes = scale_codes, .scales = scales};
    search(&job);
}

OM_EXPORT void om_search_int8(const void *values, int32_t dtype, int64_t num_blocks, int64_t row_blocks, const float *importance,
                              int8_t *codes, float *scales) {
    search_job job = {.values = values, .dtype = dtype, .num_blocks = num_blocks, .row_blocks = row_blocks,
                      .importance = importance, .codes = (uint8_t *)codes, .scales = scales, .is_int8 = 1};
    search(&job);
}

typedef struct {
    float *values;
    const float *scales, *feedback;
    int64_t num_rows;
    uint8_t *codes;
} feedback_job;

static void feed_back_unit(void *context, int64_t unit, int64_t next, int thread) {
    const feedback_job *job = context;
    const int64_t first = unit * OM_BLOCK;
    (void)next, (void)thread;
    om_active_isa()->feed_back_nf4_tile(job->values + first, job->scales + first, job->feedback, job->num_rows, job->codes + first);
}

/* Codes of 64 columns [64, num_rows] with these scales, one byte each; num_rows is a multiple of 64. The error of a column is
 * subtracted from later ones times feedback[column, later], and takes the place of its values. */
OM_EXPORT void om_feed_back_nf4(float *values, const float *scales, const float *feedback, int64_t num_rows, uint8_t *codes) {
    feedback_job job = {.values = values, .scales = scales, .feedback = feedback, .num_rows = num_rows, .codes = codes};
    om_pool_begin();
    om_pool_run(feed_back_unit, &job, num_rows / OM_BLOCK);
    om_pool_end();
}
