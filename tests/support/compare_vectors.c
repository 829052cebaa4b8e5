/* compare_vectors NAME: the vectors of the set NAME against the portable ones, bit for bit, without Python: for emulators, and
 * for sets that were changed on purpose. Links with `vector_*.c` alone. Exits 1 on a difference. */
#include "vector_set.h"
#include "noise.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_HEADS = 9, MAX_DIM = 144, MAX_WIDTH = MAX_DIM + 64, ROWS = OM_SECTION, COUNT = 1500 };

static uint16_t bf16_rows[3][ROWS * MAX_DIM];
static float fp32_rows[3][ROWS * MAX_DIM], q[MAX_HEADS * MAX_WIDTH], room[MAX_HEADS * OM_SECTION];
static float sums[2][2 * MAX_HEADS * MAX_DIM], means[2][MAX_DIM];
static om_section sections[2][2 * MAX_HEADS];

#define SET(NAME, TABLE) \
    if (strcmp(name, NAME) == 0) return &TABLE;

/* OM_ONLY_...: without references to the other sets. */
static const om_vector_set *find(const char *name) {
#if defined(OM_ONLY_AVX512)
    SET("avx512", om_vectors_avx512)
#elif defined(OM_ONLY_AVX2)
    SET("avx2", om_vectors_avx2)
#elif defined(__aarch64__)
    SET("neon", om_vectors_neon)
#endif
    return NULL;
}

static void fill(float *values, int64_t count) {
    for (int64_t i = 0; i < count; i++) values[i] = noise();
}

static int differ(const char *what, const void *mine, const void *theirs, size_t num_bytes) {
    if (memcmp(mine, theirs, num_bytes) == 0) return 0;
    printf("%s: other bits than portable\n", what);
    return 1;
}

/* Two sections of two sizes, and their mean: the heads of one token, then those of tokens that follow each other. */
static int compare_attention(const om_vector_set *set, om_cached c, int64_t num_heads, int64_t count) {
    const om_vector_set *sets[] = {set, &om_vectors_portable};
    const float sink = noise();
    int64_t counts[2][MAX_HEADS];
    int num_bad = 0;
    for (int64_t h = 0; h < num_heads; h++) {
        counts[0][h] = count;
        counts[1][h] = (count + 1) / 2 + h < count ? (count + 1) / 2 + h : count;
    }
    for (int which = 0; which < 2; which++) {
        memset(sums[which], 0, sizeof sums[which]);
        for (int n = 0; n < 2; n++)
            sets[which]->attend(&c, q, num_heads, counts[n], room, sections[which] + n, sums[which] + n * c.value_dim, 2);
    }
    num_bad += differ("sections", sections[0], sections[1], (size_t)num_heads * 2 * sizeof(om_section));
    num_bad += differ("weighed values", sums[0], sums[1], sizeof sums[0]);
    for (int has_sink = 0; has_sink < 2; has_sink++) {
        for (int which = 0; which < 2; which++)
            sets[which]->merge(sections[1], sums[1], 2, c.value_dim, has_sink ? &sink : NULL, means[which]);
        num_bad += differ("means", means[0], means[1], (size_t)c.value_dim * sizeof(float));
    }
    return num_bad > 0;
}

static int compare_all_attention(const om_vector_set *set) {
    static const int64_t dims[][3] = {{16, 0, 16}, {128, 0, 128}, {80, 0, 80}, {96, 64, 96}, {144, 16, 48}};
    static const int64_t heads[] = {1, 2, 3, 7, 9}, counts[] = {1, 5, 16, 67, 200, OM_SECTION};
    int num_bad = 0, num_cases = 0;
    for (int is_bf16 = 0; is_bf16 < 2; is_bf16++)
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
            for (size_t h = 0; h < sizeof heads / sizeof *heads; h++)
                for (size_t n = 0; n < sizeof counts / sizeof *counts; n++, num_cases++) {
                    const void *rows[3];
                    for (int part = 0; part < 3; part++) {
                        fill(fp32_rows[part], ROWS * MAX_DIM);
                        for (int64_t i = 0; i < ROWS * MAX_DIM; i++) bf16_rows[part][i] = om_float_to_bf16(fp32_rows[part][i]);
                        rows[part] = is_bf16 ? (const void *)bf16_rows[part] : fp32_rows[part];
                    }
                    fill(q, MAX_HEADS * MAX_WIDTH);
                    const om_cached c = {.keys = rows[0], .more_keys = rows[1], .values = rows[2], .dim = dims[d][0],
                                         .more_dim = dims[d][1], .value_dim = dims[d][2], .scaling = 0.21f, .is_bf16 = is_bf16};
                    num_bad += compare_attention(set, c, heads[h], counts[n]);
                }
    printf("vectors: %d of %d attentions have other bits than portable\n", num_bad, num_cases);
    return num_bad;
}

static int compare_sums(const om_vector_set *set) {
    static float a[COUNT], b[COUNT], mine[COUNT], theirs[COUNT];
    static const int64_t lengths[] = {1, 7, 16, 40, 100, 1024, COUNT};
    int num_bad = 0, num_cases = 0;
    for (size_t n = 0; n < sizeof lengths / sizeof *lengths; n++, num_cases += 5) {
        const int64_t length = lengths[n];
        const size_t num_bytes = (size_t)length * sizeof(float);
        fill(a, length), fill(b, length);
        float my_sum = set->dot(a, b, length), their_sum = om_vectors_portable.dot(a, b, length);
        num_bad += differ("a dot product", &my_sum, &their_sum, sizeof my_sum);
        set->rms_norm(a, b, length, 1e-5f, mine), om_vectors_portable.rms_norm(a, b, length, 1e-5f, theirs);
        num_bad += differ("a norm", mine, theirs, num_bytes);
        set->layer_norm(a, b, a, length, 1e-5f, mine), om_vectors_portable.layer_norm(a, b, a, length, 1e-5f, theirs);
        num_bad += differ("a layer norm", mine, theirs, num_bytes);
        memcpy(mine, a, num_bytes), memcpy(theirs, a, num_bytes);
        my_sum = set->exponentials(mine, length), their_sum = om_vectors_portable.exponentials(theirs, length);
        num_bad += differ("exponentials", mine, theirs, num_bytes) + differ("their sum", &my_sum, &their_sum, sizeof my_sum) > 0;
        set->sigmoids(mine, length), om_vectors_portable.sigmoids(theirs, length);
        num_bad += differ("sigmoids", mine, theirs, num_bytes);
    }
    printf("vectors: %d of %d sums have other bits than portable\n", num_bad, num_cases);
    return num_bad;
}

static int compare_rows(const om_vector_set *set) {
    enum { NUM_ROWS = 7 };
    static const int64_t columns[] = {5, 16, 40, 128, MAX_DIM};
    static float values[OM_TILE][MAX_DIM], mine[NUM_ROWS * OM_TILE], theirs[NUM_ROWS * OM_TILE];
    int num_bad = 0, num_cases = 0;
    static uint16_t fp16_rows[NUM_ROWS * MAX_DIM]; /* finite, some of them subnormal */
    fill(values[0], OM_TILE * MAX_DIM);
    for (int i = 0; i < NUM_ROWS * MAX_DIM; i++) fp16_rows[i] = (uint16_t)(rand() >> 7) & 0xbfff;
    const void *const numbers[] = {[OM_BF16] = bf16_rows[0], [OM_FP32] = fp32_rows[0], [OM_FP16] = fp16_rows};
    for (int codec = OM_BF16; codec <= OM_FP16; codec++)
        for (size_t c = 0; c < sizeof columns / sizeof *columns; c++)
            for (int num_tokens = 1; num_tokens <= OM_TILE; num_tokens *= 2, num_cases++) {
                const om_weights w = {.codes = numbers[codec],
                                      .rows = NUM_ROWS, .cols = columns[c]};
                om_tile tile = {.num_tokens = num_tokens};
                for (int t = 0; t < num_tokens; t++) tile.values[t] = values[t];
                memset(mine, 0, sizeof mine), memset(theirs, 0, sizeof theirs);
                set->value_rows[codec - OM_BF16](&w, 0, NUM_ROWS, &tile, mine);
                om_vectors_portable.value_rows[codec - OM_BF16](&w, 0, NUM_ROWS, &tile, theirs);
                num_bad += differ("rows of numbers", mine, theirs, sizeof mine);
            }
    printf("vectors: %d of %d rows have other bits than portable\n", num_bad, num_cases);
    return num_bad;
}

enum { DELTA_DIM = 128, KEY_HEADS = 2, DELTA_HEADS = 3 * KEY_HEADS, TAPS = 4,
       CHANNELS = 2 * KEY_HEADS * DELTA_DIM + DELTA_HEADS * DELTA_DIM };

typedef struct {
    float inputs[2][CHANNELS * TAPS], state[2][DELTA_HEADS * DELTA_DIM * DELTA_DIM], out[DELTA_HEADS * DELTA_DIM];
} delta_results;

/* Tokens one behind the other, in place and from one place to the other: many where the state is small, for the numbers that its
 * heads fade by. */
static int compare_delta(const om_vector_set *set, om_delta layer) {
    static float mixed[CHANNELS], gates[DELTA_HEADS * DELTA_DIM], strengths[DELTA_HEADS], times[DELTA_HEADS];
    static delta_results results[2];
    const om_vector_set *sets[] = {set, &om_vectors_portable};
    const int64_t shared = layer.num_heads / KEY_HEADS, keys = KEY_HEADS * layer.key_dim;
    const om_delta_inputs projected = {.queries = mixed, .keys = mixed + keys, .values = mixed + 2 * keys, .gates = gates,
        .strengths = strengths, .times = times, .strides = {layer.key_dim, shared * layer.value_dim, shared * layer.value_dim, shared}};
    const int num_tokens = layer.value_dim == 16 ? 150 : 3;
    int num_bad = 0, at = 0;
    memset(results, 0, sizeof results);
    for (int token = 0; token < num_tokens; token++) {
        const int next = token % 3 == 0 ? at : !at;
        fill(mixed, CHANNELS), fill(gates, DELTA_HEADS * DELTA_DIM), fill(strengths, DELTA_HEADS);
        for (int h = 0; h < DELTA_HEADS; h++) times[h] = (h % 2 ? 12.0f : 2.0f) * noise(); /* also beyond both ends of the softplus */
        for (int which = 0; which < 2; which++) {
            delta_results *to = results + which;
            const om_delta_states states = {to->inputs[at], to->state[at], to->inputs[next], to->state[next]};
            for (int64_t g = 0; g < KEY_HEADS; g++) sets[which]->delta_heads(&layer, &projected, g, &states, to->out);
        }
        at = next;
        num_bad += differ("a step of a delta rule", results, results + 1, sizeof *results);
    }
    return num_bad > 0;
}

static int compare_deltas(const om_vector_set *set) {
    static const int64_t dims[][2] = {{16, 16}, {16, 80}, {DELTA_DIM, 48}, {32, DELTA_DIM}};
    static float weight[CHANNELS * TAPS], bias[CHANNELS], decays[DELTA_HEADS], time_biases[DELTA_HEADS], norm[DELTA_DIM];
    int num_bad = 0, num_cases = 0;
    fill(weight, CHANNELS * TAPS), fill(bias, CHANNELS), fill(time_biases, DELTA_HEADS), fill(norm, DELTA_DIM);
    for (int h = 0; h < DELTA_HEADS; h++) decays[h] = -0.5f * (float)(h + 1);
    for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
        for (int64_t shared = 1; shared <= DELTA_HEADS / KEY_HEADS; shared++)
            for (int64_t taps = 2; taps <= TAPS; taps++, num_cases++)
                num_bad += compare_delta(set, (om_delta){
                    .conv_weight = weight, .conv_bias = taps % 2 ? bias : NULL, .decays = decays, .time_biases = time_biases,
                    .norm = norm, .num_heads = shared * KEY_HEADS, .num_key_heads = KEY_HEADS, .key_dim = dims[d][0],
                    .value_dim = dims[d][1], .conv_length = taps, .epsilon = 1e-6f});
    printf("vectors: %d of %d delta rules have other bits than portable\n", num_bad, num_cases);
    return num_bad;
}

int main(int count, char **arguments) {
    const om_vector_set *set = count == 2 ? find(arguments[1]) : NULL;
    if (set == NULL) return 2;
    return compare_all_attention(set) + compare_sums(set) + compare_rows(set) + compare_deltas(set) > 0;
}
