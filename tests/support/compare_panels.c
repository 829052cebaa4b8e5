/* compare_panels NAME: the panels of the set NAME against the portable ones, bit for bit, without Python: for emulators, and
 * for sets that were changed on purpose. Links with `panel_*.c` and `cpu.c` alone. Exits 1 on a difference. */
#include "arithmetic.h"
#include "gguf_types.h"
#include "panel.h"
#include "noise.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ROWS = 53, MAX_COLUMNS = 2048, MAX_BLOCKS = MAX_COLUMNS / OM_BLOCK, COUNT = 4096 };

static const char *const codecs[] = {
    "nf4",    "int8", "mxfp4", "bf16", "fp32", "fp16", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
    "Q8_0", "IQ4_NL", "MXFP4 of GGUF", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"};
static uint8_t codes[MAX_ROWS * MAX_COLUMNS * 2], scales[MAX_ROWS * MAX_BLOCKS * 4];
static float nested[MAX_ROWS * MAX_BLOCKS / OM_NESTED + 2], x[OM_TILE * MAX_COLUMNS];
static int8_t quants[2][OM_TILE * MAX_COLUMNS];
static float input_scales[2][OM_TILE * MAX_BLOCKS * 2];
static int32_t corrections[2][OM_TILE * MAX_BLOCKS * OM_SUMS];
static float results[2][OM_TILE * MAX_ROWS];

#define SET(NAME, TABLE) \
    if (strcmp(name, NAME) == 0) return &TABLE;

/* OM_ONLY_...: without references to the other sets. */
static const om_panel_set *find(const char *name) {
#if defined(OM_ONLY_AVX512VBMI)
    SET("avx512vbmi", om_panels_avx512_vbmi)
#elif defined(OM_ONLY_AVX512)
    SET("avx512", om_panels_avx512)
#elif defined(OM_ONLY_AVX512VL)
    SET("avx512vl", om_panels_avx512_vl)
#elif defined(OM_ONLY_AVXVNNI)
    SET("avxvnni", om_panels_avx_vnni)
#elif defined(OM_ONLY_AVX2)
    SET("avx2", om_panels_avx2)
#elif defined(__aarch64__)
    SET("neon", om_panels_neon)
#endif
    return NULL;
}

/* Scales below 2: the upper bit of the exponent is cleared in the first dwords of each chunk, and beside the dwords. */
static void make_scales_finite(int codec, int64_t rows, int64_t chunks) {
    const int64_t dwords = om_chunk_dwords(codec), num_headers = om_has_mins(codec) && !OM_IS_OF_256(codec) ? 2 : 1;
    for (int64_t first = 0; first < rows; first += OM_PANEL) {
        const int64_t num_rows = rows - first < OM_PANEL ? rows - first : OM_PANEL;
        for (int64_t k = 0; k < chunks; k++) {
            uint8_t *chunk = codes + (first * chunks + k * num_rows) * dwords * 4;
            for (int64_t i = 1; i < num_headers * num_rows * 4; i += 2) chunk[i] &= 0xbf;
        }
    }
    if (codec != OM_GGUF_MXFP4)
        for (size_t i = 1; i < sizeof scales; i += 2) scales[i] = (uint8_t)(rand() >> 7) & 0xbf;
}

static om_weights random_weights(int codec, int64_t rows, int64_t blocks) {
    for (size_t i = 0; i < sizeof codes; i++) codes[i] = (uint8_t)(rand() >> 7);
    for (size_t i = 0; i < sizeof nested / sizeof *nested; i++) nested[i] = 0.01f + noise() / 500.0f;
    for (size_t i = 0; i < sizeof scales; i++) scales[i] = codec == OM_NF4 ? (uint8_t)(rand() >> 7) : (uint8_t)(110 + rand() % 20);
    if (codec == OM_INT8)
        for (size_t i = 0; i < sizeof scales / 4; i++) ((float *)scales)[i] = 0.01f + noise() / 500.0f;
    const int64_t chunks = OM_IS_GGUF(codec) ? blocks * OM_BLOCK / OM_CHUNK_COLUMNS(codec) : 0;
    if (OM_IS_GGUF(codec)) make_scales_finite(codec, rows, chunks);
    return (om_weights){.codes = codes, .scales = scales, .nested_scales = nested, .nested_offset = 0.05f, .rows = rows,
                        .cols = blocks * OM_BLOCK, .blocks = blocks, .codec = codec,
                        .row_bytes = (OM_IS_GGUF(codec) ? chunks * om_chunk_dwords(codec) : blocks * OM_ROW_DWORDS(codec)) * 4};
}

/* The set's own quantization of T tokens, interleaved. */
static om_panel_tile quantize(const om_panel_set *set, int which, int codec, int64_t blocks, int num_tokens) {
    const int64_t groups = blocks * OM_GROUPS(codec);
    for (int t = 0; t < num_tokens; t++) {
        static int8_t q[MAX_COLUMNS];
        static float s[MAX_BLOCKS * 2];
        static int32_t c[MAX_BLOCKS * OM_SUMS];
        om_panel_token token = {q, s, c};
        set->quantize_blocks(codec, x + t * MAX_COLUMNS, 0, blocks, &token);
        for (int64_t b = 0; b < blocks; b++) memcpy(quants[which] + (b * num_tokens + t) * OM_BLOCK, q + b * OM_BLOCK, OM_BLOCK);
        for (int64_t g = 0; g < groups; g++) input_scales[which][g * num_tokens + t] = s[g];
        for (int64_t i = 0; i < blocks * OM_CORRECTIONS(codec); i++) corrections[which][i * num_tokens + t] = c[i];
    }
    return (om_panel_tile){quants[which], input_scales[which], corrections[which], num_tokens};
}

/* NaNs of any payload are the same. */
static int have_other_bits(const float *mine, const float *theirs, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (om_bits(mine[i]) != om_bits(theirs[i]) && !(isnan(mine[i]) && isnan(theirs[i]))) return 1;
    return 0;
}

static void fill_inputs(void) {
    for (int i = 0; i < OM_TILE * MAX_COLUMNS; i++) x[i] = noise();
}

/* Numbers around 2^-100, subnormal and huge ones, and zeros, by block; infinity or NaN in the odd tokens. */
static void fill_special_inputs(void) {
    static const float sizes[] = {0.0f, 0x1p-102f, 0x1p-101f, 1e-40f, 1e30f, 1.0f}; /* of numbers up to twice as great */
    for (int i = 0; i < OM_TILE * MAX_COLUMNS; i++) {
        const int token = i / MAX_COLUMNS, column = i % MAX_COLUMNS;
        const float size = sizes[(token + column / OM_BLOCK) % 6];
        x[i] = column % 32 == 5 ? -2.0f * size : size * noise();
        if (column == 9 && token % 2) x[i] = token % 4 == 1 ? NAN : -INFINITY;
    }
}

static void spoil_scales(int codec) {
    if (codec == OM_MXFP4) scales[3] = 0, scales[20] = 255, scales[37] = 254;
    if (codec == OM_INT8) ((float *)scales)[3] = 1e-40f, ((float *)scales)[20] = NAN, ((float *)scales)[37] = INFINITY;
    if (codec == OM_NF4) nested[0] = 1e-40f;
}

static int compare_case(const om_panel_set *set, int codec, int64_t rows, int64_t blocks, int num_tokens, int is_special) {
    const om_panel_set *sets[] = {set, &om_panels_portable};
    const om_weights w = random_weights(codec, rows, blocks);
    (is_special ? fill_special_inputs : fill_inputs)();
    if (is_special) spoil_scales(codec);
    memset(results, 0, sizeof results);
    for (int which = 0; which < 2; which++) {
        const om_panel_tile tile = quantize(sets[which], which, codec, blocks, num_tokens);
        sets[which]->rows[codec](&w, 0, rows, &tile, results[which], MAX_ROWS);
    }
    if (!have_other_bits(results[0], results[1], OM_TILE * MAX_ROWS)) return 0;
    printf("%s%s, %d rows, %d blocks, %d tokens: other bits than portable\n", is_special ? "special " : "", codecs[codec], (int)rows,
           (int)blocks, num_tokens);
    return 1;
}

static int compare_rows(const om_panel_set *set) {
    static const int64_t rows[] = {16, 53, 37, 7}, blocks[] = {1, 2, 5, 12, 32};
    int num_bad = 0, num_cases = 0;
    for (int codec = OM_NF4; codec < OM_NUM_CODECS; codec++)
        for (size_t b = OM_ARE_VALUES(codec) ? 5 : OM_IS_GGUF(codec) && OM_IS_OF_256(codec) ? 3 : 0; b < 5; b++)
            for (int num_tokens = 1; num_tokens <= OM_TILE; num_tokens *= 2, num_cases += 5) {
                for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
                    num_bad += compare_case(set, codec, rows[r], blocks[b], num_tokens, 0);
                num_bad += compare_case(set, codec, MAX_ROWS, blocks[b], num_tokens, 1);
            }
    printf("panels: %d of %d cases have other bits than portable\n", num_bad, num_cases);
    return num_bad;
}

static int compare_activations(const om_panel_set *set) {
    static float gate[COUNT], up[COUNT], mine[COUNT], portable[COUNT];
    static const float special[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-40f, 3e38f, -3e38f, 88.0f, -87.0f};
    enum { NUM_SPECIAL = sizeof special / sizeof *special };
    int num_bad = 0;
    for (int i = 0; i < COUNT; i++) gate[i] = noise() * noise() * 25.0f, up[i] = noise() * 5.0f;
    for (int i = 0; i < NUM_SPECIAL * NUM_SPECIAL; i++) gate[i] = special[i % NUM_SPECIAL], up[i] = special[i / NUM_SPECIAL];
    for (int activation = OM_SILU; activation <= OM_IDENTITY; activation++) {
        set->activate(activation, 1.702f, 7.0f, 1, gate, up, mine, COUNT);
        om_panels_portable.activate(activation, 1.702f, 7.0f, 1, gate, up, portable, COUNT);
        num_bad += have_other_bits(mine, portable, COUNT);
    }
    printf("panels: %d of %d activations have other bits than portable\n", num_bad, OM_IDENTITY + 1);
    return num_bad;
}

int main(int count, char **arguments) {
    const om_panel_set *set = count == 2 ? find(arguments[1]) : NULL;
    if (set == NULL) return 2;
    return compare_rows(set) + compare_activations(set) > 0;
}
