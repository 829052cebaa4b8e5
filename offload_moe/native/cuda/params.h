/* Parameters and launches of the card's kernels: docs/decisions/100-device-kernels.md.
 *
 * One text for NVRTC, nvcc, the tests' shim and the host's C: no header, only types whose size is the same everywhere. Each
 * kernel takes one of these structs by value. What changes from token to token lies in device memory behind a pointer.
 *
 * Shape legend: T rows of activations (tokens), R the rows that a kernel was compiled for (1, 2, 4 or 8; T at most R), H hidden,
 * I intermediate, K experts of a row, V tokens of the vocabulary. A block is 64 columns. Memory begins at multiples of 16 bytes,
 * and inputs have R rows: those behind T are read where several are multiplied together, and nothing is written for them. */
#ifndef OM_CARD_PARAMS_H
#define OM_CARD_PARAMS_H

typedef unsigned long long om_card_address;

/* Of a launch: nothing is read or written where *stop is not 0. */
typedef struct {
    const int *stop;
    const int *num_rows; /* T */
} om_card_pass;

/* Where a matrix in panels, or of plain numbers, lies inside its record: byte offsets, -1 for what it does not have. Codes and
 * scales begin at multiples of 16 bytes. */
typedef struct {
    long long codes, scales, nested_scales, nested_offset, bias;
    int bias_dtype; /* OM_F32 or OM_BF16_VALUES */
    int rows;
} om_card_matrix;

/* Activations in int8, in the order of the codec that reads them: quants [T, blocks, 64], scales [T, groups]. GGUF's types
 * read those of int8. */
typedef struct {
    signed char *quants;
    float *scales;
} om_card_input;

/* sum = x + scale * added; normed = its RMS norm, or its layer norm; the norm quantized; the share of a shared expert. Grid: R. */
typedef struct {
    om_card_pass pass;
    const float *x;           /* [T, H] */
    const float *added;       /* [T, num_added, H], added up in this order; NULL: sum is x */
    const float *weight;      /* [H]; NULL: only the sum is made */
    const float *bias;        /* [H] of a layer norm; NULL: an RMS norm */
    const float *gate;        /* [H] of a shared expert, or NULL */
    float *sum, *normed;      /* [T, H], or NULL; `sum` may be `x` */
    float *shares;            /* [T]: the sigmoid of gate times normed */
    om_card_input inputs[3];  /* by codec; NULL where it is not needed */
    float epsilon, scale;
    int num_added;
    int from_zero; /* what is added up begins at +0, as experts do; else with its first part */
} om_card_norm_params;

/* inputs = x[T, columns] in int8. Grid: OM_QUANTIZE_BLOCKS, R. */
typedef struct {
    om_card_pass pass;
    const float *x;
    om_card_input inputs[3];
} om_card_quantize_params;

/* outs[i][T, rows of i] = x times matrix i, plus the bias in its record, plus biases[i]. Grid: the sum of OM_LINEAR_BLOCKS of
 * the matrices; of plain numbers, of OM_VALUES_BLOCKS. */
typedef struct {
    om_card_pass pass;
    om_card_input input; /* of matrices in panels */
    const float *x;      /* [T, columns], of matrices of plain numbers */
    om_card_matrix matrices[4];
    const unsigned char *records[4];
    const float *biases[4]; /* [rows] or NULL */
    float *outs[4];
    int num_matrices;
} om_card_linear_params;

/* inputs = the rows of all pairs in int8, each its row of x times its weight: of experts whose inputs are scaled. Grid:
 * OM_QUANTIZE_BLOCKS, R * top_k. */
typedef struct {
    om_card_pass pass;
    const float *x;          /* [T, columns] */
    const float *weights;    /* [T, K] */
    om_card_input inputs[3]; /* [T * K rows] */
    float weight_scale;
    int top_k;
} om_card_scale_params;

/* The first matrix of the experts of all rows, and their activation. Of GGUF's types gate and up rows are two matrices.
 * addresses [T, K] of the records; 0: the pair is computed elsewhere, or later. Pairs of equal addresses read the record once.
 * Grid: OM_FIRST_BLOCKS, R * top_k. */
typedef struct {
    om_card_pass pass;
    om_card_input input;
    om_card_matrix matrix, up; /* `up`: of GGUF's types */
    const om_card_address *addresses;
    om_card_input hidden; /* [T * K rows], for the second matrix */
    float alpha, limit;   /* of gpt-oss */
    int top_k;
    int pairs_of_input;   /* pairs that share a row of the input: K, or 1 where each pair has its own */
} om_card_first_params;

/* The second matrix of the same experts. pairs [T, stride, H]: weight * y of a row's experts, by ascending id. Grid:
 * OM_SECOND_BLOCKS, R * top_k. */
typedef struct {
    om_card_pass pass;
    om_card_input hidden;
    om_card_matrix matrix;
    const om_card_address *addresses;
    const int *ids;       /* [T, K] */
    const float *weights; /* [T, K]; NULL: all are 1 */
    float *pairs;
    float weight_scale;
    int top_k, stride;
} om_card_second_params;

/* The gate and up matrices of a gated MLP that every row takes, and their activation. Grid: OM_FIRST_BLOCKS. */
typedef struct {
    om_card_pass pass;
    om_card_input input;
    om_card_matrix matrices[2];
    const unsigned char *records[2];
    om_card_input hidden; /* [T rows] */
} om_card_mlp_first_params;

/* Its second matrix: out[t * stride] = shares[t] * y, or y where `shares` is NULL. Grid: OM_SECOND_BLOCKS. */
typedef struct {
    om_card_pass pass;
    om_card_input hidden;
    om_card_matrix matrix;
    const unsigned char *record;
    const float *shares;
    float *out;
    int stride; /* in rows of H */
} om_card_mlp_second_params;

/* Both for a gated MLP of plain numbers. Grid: OM_VALUES_BLOCKS of I; of H. */
typedef struct {
    om_card_pass pass;
    const float *x; /* [T, H] */
    om_card_matrix matrices[2];
    const unsigned char *records[2];
    float *hidden; /* [T, I] */
} om_card_values_first_params;
typedef struct {
    om_card_pass pass;
    const float *x; /* [T, I] */
    om_card_matrix matrix;
    const unsigned char *record;
    const float *shares;
    float *out;
    int stride; /* in rows of H */
} om_card_values_second_params;

/* x[T, H] = scale * table[tokens[T]]. Grid: OM_EMBED_BLOCKS, R. */
typedef struct {
    om_card_pass pass;
    const int *tokens; /* [T]; of those outside of the table x becomes NaN */
    const void *table; /* [V, H], bf16 or fp32; or rows of blocks of Q8_0, Q4_K or Q6_K, which begin at even addresses */
    float *x;
    float scale;
    int num_tokens; /* V */
} om_card_embed_params;

/* How a row's token is chosen, in device memory. A draw depends on its seed and the row's position alone. */
typedef struct {
    float temperature; /* 0: the greatest logit */
    float top_p;       /* 1: all tokens */
    int top_k;         /* 0: all tokens */
    int reserved;
    unsigned long long seed;
} om_card_sampling;

/* The greatest logit of each part of a row. Grid: OM_GREATEST_BLOCKS(V), R. Then the next token of each row. Grid: R. */
typedef struct {
    om_card_pass pass;
    const float *logits;          /* [T, V] */
    unsigned long long *greatest; /* [T, OM_GREATEST_BLOCKS(V)] */
    const om_card_sampling *sampling; /* [T] */
    const int *positions;             /* [T], in their sequences */
    int *tokens;                      /* [T] */
    int num_tokens; /* V */
} om_card_choose_params;

/* Launches. `codec` is the number of a matrix' codec, `cols` are its columns, `rows` its rows, R as above. A unit is what four
 * threads multiply of a panel: two blocks, or a superblock of GGUF's types. */
#define OM_CARD_UP(a, b) (((a) + (b)-1) / (b))
#define OM_CARD_LEAST(a, b) ((a) < (b) ? (a) : (b))
#define OM_CARD_PANELS(rows) OM_CARD_UP(rows, 16)
#define OM_CARD_SUPERBLOCKS 13 /* the first codec with superblocks of 256 columns */
#define OM_CARD_UNITS(codec, cols) OM_CARD_UP(cols, (codec) >= OM_CARD_SUPERBLOCKS ? 256 : 128)
/* Panels that a thread block multiplies: so many that it has about 128 to 256 threads, four for each unit of each. */
#define OM_CARD_GROUP(units) ((units) >= 32 ? 1 : (units) >= 16 ? 2 : (units) >= 8 ? 4 : 8)
/* Units at a time: 512 threads, or 256 that may have 255 registers each; and 24 KiB of shared memory for the sums of R rows, or
 * 40 KiB where a unit has two sums. */
#define OM_CARD_SUMS(codec) ((codec) >= OM_CARD_SUPERBLOCKS ? 256 : 384)
#define OM_CARD_MOST(codec, group, R) OM_CARD_LEAST(((R) > 2 ? 64 : 128) / (group), OM_CARD_SUMS(codec) / ((group) * (R)))
#define OM_CARD_PASSES(codec, group, cols, R) OM_CARD_UP(OM_CARD_UNITS(codec, cols), OM_CARD_MOST(codec, group, R))
#define OM_CARD_CHUNK(codec, group, cols, R) OM_CARD_UP(OM_CARD_UNITS(codec, cols), OM_CARD_PASSES(codec, group, cols, R))
#define OM_CARD_THREADS(codec, group, cols, R) (OM_CARD_UP((group) * OM_CARD_CHUNK(codec, group, cols, R), 8) * 32)

#define OM_NORM_THREADS 512
#define OM_QUANTIZE_THREADS 128
#define OM_QUANTIZE_BLOCKS(cols) OM_CARD_UP(cols, 256)
#define OM_LINEAR_GROUP(codec, cols) OM_CARD_GROUP(OM_CARD_UNITS(codec, cols))
/* Rows of a linear that are multiplied together: superblocks need too many registers for eight. */
#define OM_LINEAR_TILE(codec, R) ((codec) >= OM_CARD_SUPERBLOCKS ? OM_EXPERT_TILE(R) : (R))
#define OM_LINEAR_THREADS(codec, cols, R) OM_CARD_THREADS(codec, OM_LINEAR_GROUP(codec, cols), cols, OM_LINEAR_TILE(codec, R))
#define OM_LINEAR_BLOCKS(codec, rows, cols) OM_CARD_UP(OM_CARD_PANELS(rows), OM_LINEAR_GROUP(codec, cols))
#define OM_VALUES_THREADS 128
#define OM_VALUES_BLOCKS(rows) OM_CARD_UP(rows, 16)
/* Rows of experts that are multiplied together; more rows of one expert take turns. */
#define OM_EXPERT_TILE(R) OM_CARD_LEAST(R, 4)
#define OM_FIRST_THREADS(codec, cols, R, has_gate) OM_CARD_THREADS(codec, (has_gate) ? 8 : 4, cols, OM_EXPERT_TILE(R))
#define OM_FIRST_BLOCKS(intermediate) OM_CARD_UP(intermediate, 64)
#define OM_SECOND_THREADS(codec, cols, R) OM_CARD_THREADS(codec, OM_LINEAR_GROUP(codec, cols), cols, OM_EXPERT_TILE(R))
#define OM_SECOND_BLOCKS(codec, rows, cols) OM_LINEAR_BLOCKS(codec, rows, cols)
#define OM_EMBED_THREADS 256
#define OM_EMBED_BLOCKS(hidden) OM_CARD_UP(hidden, 1024)
#define OM_GREATEST_THREADS 256
#define OM_GREATEST_BLOCKS(num_tokens) OM_CARD_LEAST(OM_CARD_UP(num_tokens, 1024), 256)
#define OM_CHOOSE_THREADS 1024

#endif
