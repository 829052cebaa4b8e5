/* Chunks of GGUF's types in numbers. Source: ggml-common.h and `dequantize_row_*` of ggml-quants.c in llama.cpp. */
#include "gguf_types.h"
#include "levels.h"

#include <string.h>

static float half_at(const uint8_t *bytes) {
    uint16_t half;
    memcpy(&half, bytes, sizeof half);
    return om_fp16_to_float(half);
}

/* 32 weights of which byte i holds i (low nibble) and i + 16. */
static void decode_nibbles(const uint8_t *bytes, const int8_t *levels, int8_t *codes) {
    for (int i = 0; i < 16; i++) {
        codes[i] = levels[bytes[i] & 15];
        codes[16 + i] = levels[bytes[i] >> 4];
    }
}

/* Adds bit i of 32 as 16 to weight i. */
static void add_fifth_bits(const uint8_t *bytes, int8_t *codes) {
    for (int i = 0; i < 32; i++) codes[i] = (int8_t)(codes[i] + ((bytes[i / 8] >> i % 8 & 1) << 4));
}

static void decode_32(const int codec, const uint8_t *bytes, int j, om_gguf_chunk *chunk) {
    static const int8_t from_zero[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static const int8_t centred[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    static const int8_t iq4[16] = {OM_IQ4_LEVELS}, mxfp4[16] = {OM_MXFP4_LEVELS};
    int8_t *codes = chunk->codes + 32 * j;
    chunk->steps[j] = codec == OM_GGUF_MXFP4 ? om_e8m0(bytes[0]) : half_at(bytes);
    switch (codec) {
    case OM_Q4_0: decode_nibbles(bytes + 2, centred, codes); break;
    case OM_IQ4_NL: decode_nibbles(bytes + 2, iq4, codes); break;
    case OM_GGUF_MXFP4: decode_nibbles(bytes + 1, mxfp4, codes); break;
    case OM_Q8_0: memcpy(codes, bytes + 2, 32); break;
    case OM_Q4_1:
        chunk->least[j] = half_at(bytes + 2);
        decode_nibbles(bytes + 4, from_zero, codes);
        break;
    case OM_Q5_0:
        decode_nibbles(bytes + 6, from_zero, codes);
        add_fifth_bits(bytes + 2, codes);
        for (int i = 0; i < 32; i++) codes[i] = (int8_t)(codes[i] - 16);
        break;
    default:
        chunk->least[j] = half_at(bytes + 2);
        decode_nibbles(bytes + 8, from_zero, codes);
        add_fifth_bits(bytes + 4, codes);
    }
}

static void decode_q2_k(const uint8_t *bytes, om_gguf_chunk *chunk) {
    for (int s = 0; s < 16; s++) {
        chunk->scales[s] = bytes[s] & 15;
        chunk->mins[s] = bytes[s] >> 4;
    }
    for (int i = 0; i < OM_SUPERBLOCK; i++) chunk->codes[i] = bytes[16 + i / 128 * 32 + i % 32] >> 2 * (i / 32 % 4) & 3;
    chunk->steps[0] = half_at(bytes + 80);
    chunk->least[0] = half_at(bytes + 82);
}

static void decode_q3_k(const uint8_t *bytes, om_gguf_chunk *chunk) {
    const uint8_t *scales = bytes + 96;
    for (int s = 0; s < 16; s++)
        chunk->scales[s] = ((scales[s % 8] >> s / 8 * 4 & 15) | (scales[8 + s % 4] >> 2 * (s / 4) & 3) << 4) - 32;
    for (int i = 0; i < OM_SUPERBLOCK; i++) {
        const int low = bytes[32 + i / 128 * 32 + i % 32] >> 2 * (i / 32 % 4) & 3, high = bytes[i % 32] >> i / 32 & 1;
        chunk->codes[i] = (int8_t)((low | high << 2) - 4);
    }
    chunk->steps[0] = half_at(bytes + 108);
}

/* Q4_K and Q5_K: twelve bytes hold six bits of eight scales and eight minima. */
static void decode_q45_k(const int codec, const uint8_t *bytes, om_gguf_chunk *chunk) {
    const uint8_t *packed = bytes + 4, *high = bytes + 16, *low = bytes + (codec == OM_Q4_K ? 16 : 48);
    for (int s = 0; s < 16; s++) {
        const int j = s / 2, k = j % 4;
        chunk->scales[s] = j < 4 ? packed[j] & 63 : (packed[8 + k] & 15) | packed[k] >> 6 << 4;
        chunk->mins[s] = j < 4 ? packed[4 + j] & 63 : packed[8 + k] >> 4 | packed[4 + k] >> 6 << 4;
    }
    for (int i = 0; i < OM_SUPERBLOCK; i++) {
        const int nibble = low[i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15;
        chunk->codes[i] = (int8_t)(codec == OM_Q4_K ? nibble : nibble | (high[i % 32] >> i / 32 & 1) << 4);
    }
    chunk->steps[0] = half_at(bytes);
    chunk->least[0] = half_at(bytes + 2);
}

static void decode_q6_k(const uint8_t *bytes, om_gguf_chunk *chunk) {
    for (int s = 0; s < 16; s++) chunk->scales[s] = (int8_t)bytes[192 + s];
    for (int i = 0; i < OM_SUPERBLOCK; i++) {
        const int half = i / 128, n = i / 32 % 4;
        const int low = bytes[half * 64 + n % 2 * 32 + i % 32] >> n / 2 * 4 & 15;
        chunk->codes[i] = (int8_t)((low | (bytes[128 + half * 32 + i % 32] >> 2 * n & 3) << 4) - 32);
    }
    chunk->steps[0] = half_at(bytes + 208);
}

static void decode_iq4_xs(const uint8_t *bytes, om_gguf_chunk *chunk) {
    static const int8_t levels[16] = {OM_IQ4_LEVELS};
    const int high = bytes[2] | bytes[3] << 8;
    for (int s = 0; s < 16; s++) {
        const int j = s / 2;
        chunk->scales[s] = ((bytes[4 + j / 2] >> j % 2 * 4 & 15) | (high >> 2 * j & 3) << 4) - 32;
    }
    for (int j = 0; j < 8; j++) decode_nibbles(bytes + 8 + 16 * j, levels, chunk->codes + 32 * j);
    chunk->steps[0] = half_at(bytes);
}

void om_gguf_decode(int codec, const uint8_t *bytes, om_gguf_chunk *chunk) {
    memset(chunk, 0, sizeof *chunk);
    switch (codec) {
    case OM_Q2_K: decode_q2_k(bytes, chunk); break;
    case OM_Q3_K: decode_q3_k(bytes, chunk); break;
    case OM_Q4_K:
    case OM_Q5_K: decode_q45_k(codec, bytes, chunk); break;
    case OM_Q6_K: decode_q6_k(bytes, chunk); break;
    case OM_IQ4_XS: decode_iq4_xs(bytes, chunk); break;
    default:
        for (int j = 0; j < 2; j++) decode_32(codec, bytes + j * om_chunk_bytes(codec) / 2, j, chunk);
    }
}
