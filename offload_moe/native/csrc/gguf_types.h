/* The quantized types of GGUF files, in panels: docs/decisions/120-gguf-as-it-lies.md.
 *
 * A chunk is what a row has of 64 columns (types with blocks of 32) or of 256. In a panel a chunk is a number of dwords in the
 * order in which they are read, each interleaved over the panel's rows. Two bytes that fill no dword lie apart, in `scales`:
 * the scale of Q6_K and Q3_K, and both exponents of MXFP4. */
#ifndef OM_GGUF_TYPES_H
#define OM_GGUF_TYPES_H

#include "om_kernels.h"

#define OM_SUPERBLOCK 256
#define OM_MOST_DWORDS 52 /* of a chunk */
#define OM_IS_OF_256(codec) ((codec) >= OM_Q2_K)
#define OM_CHUNK_COLUMNS(codec) (OM_IS_OF_256(codec) ? OM_SUPERBLOCK : OM_BLOCK)
#define OM_SIDE_BYTES 2 /* of a chunk that has them */

enum {
    OM_DWORDS_Q4_0 = 9, OM_DWORDS_Q4_1 = 10, OM_DWORDS_Q5_0 = 11, OM_DWORDS_Q5_1 = 12, OM_DWORDS_Q8_0 = 17, OM_DWORDS_IQ4_NL = 9,
    OM_DWORDS_MXFP4 = 8, OM_DWORDS_Q2_K = 21, OM_DWORDS_Q3_K = 27, OM_DWORDS_Q4_K = 36, OM_DWORDS_Q5_K = 44, OM_DWORDS_Q6_K = 52,
    OM_DWORDS_IQ4_XS = 34
};

OM_INLINE int om_chunk_dwords(const int codec) {
    switch (codec) {
    case OM_Q4_0: return OM_DWORDS_Q4_0;
    case OM_Q4_1: return OM_DWORDS_Q4_1;
    case OM_Q5_0: return OM_DWORDS_Q5_0;
    case OM_Q5_1: return OM_DWORDS_Q5_1;
    case OM_Q8_0: return OM_DWORDS_Q8_0;
    case OM_IQ4_NL: return OM_DWORDS_IQ4_NL;
    case OM_GGUF_MXFP4: return OM_DWORDS_MXFP4;
    case OM_Q2_K: return OM_DWORDS_Q2_K;
    case OM_Q3_K: return OM_DWORDS_Q3_K;
    case OM_Q4_K: return OM_DWORDS_Q4_K;
    case OM_Q5_K: return OM_DWORDS_Q5_K;
    case OM_Q6_K: return OM_DWORDS_Q6_K;
    default: return OM_DWORDS_IQ4_XS;
    }
}

OM_INLINE int om_has_sides(const int codec) { return codec == OM_Q6_K || codec == OM_Q3_K || codec == OM_GGUF_MXFP4; }
OM_INLINE int om_chunk_bytes(const int codec) { return 4 * om_chunk_dwords(codec) + (om_has_sides(codec) ? OM_SIDE_BYTES : 0); }
OM_INLINE int64_t om_num_chunks(const om_matrix *m) { return m->padded / OM_CHUNK_COLUMNS(m->codec); }

/* A chunk in numbers. Weight i of a sub-block s: of types with blocks of 32, steps[s] * codes[i] + least[s], s = i / 32; of the
 * others steps[0] * scales[s] * codes[i] + least[0] * mins[s], s = i / 16. MXFP4: codes are doubled, and so are scaled weights. */
typedef struct {
    int8_t codes[OM_SUPERBLOCK];
    int32_t scales[16], mins[16];
    float steps[2], least[2];
} om_gguf_chunk;

OM_INLINE int om_has_mins(const int codec) {
    return codec == OM_Q4_1 || codec == OM_Q5_1 || codec == OM_Q2_K || codec == OM_Q4_K || codec == OM_Q5_K;
}

/* A chunk as it lies in a file. */
void om_gguf_decode(int codec, const uint8_t *bytes, om_gguf_chunk *chunk);
/* A row's chunk of a panel as it lies in a file: `dwords` of its first row's, `num_rows` in the panel. */
void om_gguf_collect(int codec, const uint8_t *dwords, const uint8_t *sides, int num_rows, uint8_t *bytes);
void om_repack_gguf(const om_matrix *matrix, uint8_t *record, int32_t to_panels, uint8_t *scratch);

#endif
