/* compare_sets NAME: the kernels of rows and the encoders of the set NAME against the portable ones, without Python: for
 * emulators. Exits 1 on a difference. */
#include "om_kernels.h"
#include "noise.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int om_select(const char *name);
int om_linear_forward(const om_matrix *, const uint8_t *const *, void *const *, int64_t, const void *, int64_t, int32_t, int32_t);
void om_encode_nf4(const void *, int32_t, int64_t, uint8_t *, float *);
void om_encode_int8(const void *, int32_t, int64_t, int8_t *, float *);

enum { ROWS = 7, MAX_TOKENS = 9, MAX_COLUMNS = 1200, RECORD_BYTES = 1 << 16 };

static const char *const codecs[] = {"nf4", "int8", "mxfp4", "bf16", "fp32", "fp16"};
static uint8_t record[RECORD_BYTES];
static float x[MAX_TOKENS * MAX_COLUMNS];

static om_matrix random_matrix(int codec, int64_t columns) {
    const int64_t padded = (columns + 63) / 64 * 64, blocks = padded / 64;
    om_matrix m = {.rows = ROWS, .cols = columns, .padded = padded, .codes = 0, .scales = -1, .nested_scales = -1,
                   .nested_offset = -1, .bias = -1, .codec = codec};
    for (int i = 0; i < RECORD_BYTES; i++) record[i] = (uint8_t)rand();
    if (codec == OM_BF16) {
        for (int64_t i = 0; i < ROWS * columns; i++) ((uint16_t *)record)[i] = om_float_to_bf16(noise());
        return m;
    }
    if (codec == OM_FP32) {
        for (int64_t i = 0; i < ROWS * columns; i++) ((float *)record)[i] = noise();
        return m;
    }
    if (codec == OM_FP16) { /* numbers below 2 */
        for (int64_t i = 0; i < ROWS * columns; i++) ((uint16_t *)record)[i] = (uint16_t)rand() & 0xbfff;
        return m;
    }
    m.scales = 32768;
    if (codec == OM_INT8)
        for (int64_t i = 0; i < ROWS * blocks; i++) ((float *)(record + m.scales))[i] = fabsf(noise()) / 100.0f;
    if (codec == OM_MXFP4)
        for (int64_t i = 0; i < 2 * ROWS * blocks; i++) record[m.scales + i] = (uint8_t)(110 + rand() % 20);
    if (codec == OM_NF4) {
        m.nested_scales = 49152, m.nested_offset = 57344;
        for (int i = 0; i < 64; i++) ((float *)(record + m.nested_scales))[i] = 0.01f + fabsf(noise()) / 100.0f;
        *(float *)(record + m.nested_offset) = 0.05f;
    }
    return m;
}

static void forward(const char *set, const om_matrix *m, int64_t tokens, float *out) {
    const uint8_t *records[] = {record};
    void *outs[] = {out};
    if (om_select(set) != 0 || om_linear_forward(m, records, outs, 1, x, tokens, OM_F32, OM_F32) != 0) {
        fprintf(stderr, "cannot run the %s kernels\n", set);
        exit(2);
    }
}

static double difference(const float *a, const float *b, int64_t count) {
    double error = 0.0, size = 0.0;
    for (int64_t i = 0; i < count; i++) error += (a[i] - b[i]) * (double)(a[i] - b[i]), size += b[i] * (double)b[i];
    return sqrt(error / size);
}

static int compare_rows(const char *set) {
    static const int64_t columns[] = {1, 64, 70, 128, 192, 300, 1088, 1200}, tokens[] = {1, 2, 3, 5, 9};
    float mine[ROWS * MAX_TOKENS], portable[ROWS * MAX_TOKENS];
    int num_bad = 0, num_cases = 0;
    double worst = 0.0;
    for (int codec = OM_NF4; codec <= OM_FP16; codec++)
        for (size_t c = 0; c < sizeof columns / sizeof *columns; c++)
            for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++, num_cases++) {
                const om_matrix m = random_matrix(codec, columns[c]);
                for (int64_t i = 0; i < tokens[t] * columns[c]; i++) x[i] = noise();
                forward(set, &m, tokens[t], mine);
                forward("portable", &m, tokens[t], portable);
                const double error = difference(mine, portable, ROWS * tokens[t]);
                worst = error > worst ? error : worst;
                if (error < 1e-5) continue;
                num_bad++;
                printf("%s %s, %d columns, %d tokens: %g from portable\n", set, codecs[codec], (int)columns[c], (int)tokens[t],
                       error);
            }
    printf("%s: %d of %d cases differ from portable, largest relative difference %.1e\n", set, num_bad, num_cases, worst);
    return num_bad;
}

static int compare_encoders(const char *set) {
    enum { BLOCKS = 40 };
    static float values[BLOCKS * OM_BLOCK], scales[2][BLOCKS];
    static uint8_t codes[2][BLOCKS * OM_BLOCK];
    int num_bad = 0;
    for (int i = 0; i < BLOCKS * OM_BLOCK; i++) values[i] = noise() * noise();
    for (int is_int8 = 0; is_int8 < 2; is_int8++) {
        for (int s = 0; s < 2; s++) {
            om_select(s ? "portable" : set);
            if (is_int8)
                om_encode_int8(values, OM_F32, BLOCKS, (int8_t *)codes[s], scales[s]);
            else
                om_encode_nf4(values, OM_F32, BLOCKS, codes[s], scales[s]);
        }
        num_bad += memcmp(codes[0], codes[1], sizeof codes[0]) != 0 || memcmp(scales[0], scales[1], sizeof scales[0]) != 0;
    }
    printf("%s: %d of 2 encoders differ from portable\n", set, num_bad);
    return num_bad;
}

int main(int count, char **arguments) {
    if (count != 2) return 2;
    return compare_rows(arguments[1]) + compare_encoders(arguments[1]) > 0;
}
