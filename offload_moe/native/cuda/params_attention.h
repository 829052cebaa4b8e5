/* Parameters and launches of the kernels of attention and of routers: docs/decisions/101-device-attention.md.
 *
 * Conventions as in `params.h`. N query heads, M key/value heads, D head dim; latent attention: K unrotated and P rotated dims of
 * a head, V value dims, Z rank of the latents; E experts, K chosen by each row. A row is the next token of a sequence. */
#ifndef OM_CARD_PARAMS_ATTENTION_H
#define OM_CARD_PARAMS_ATTENTION_H

#include "params.h"

#define OM_CARD_PAGE 128    /* tokens of a page of a cache */
#define OM_CARD_SECTION 512 /* tokens that are attended to by themselves */

/* What one row attends to in one layer, in device memory. Token `i` of the room, at position base + i of its sequence, is in page
 * i / OM_CARD_PAGE; its key is at element head * key_stride + i % OM_CARD_PAGE * D of the page, in bf16, and its value likewise.
 * Latent attention has one head: keys are latents [Z], values are rotated keys [P]. Pages begin at multiples of 16 bytes. */
typedef struct {
    void *const *key_pages, *const *value_pages;
    long long key_stride, value_stride;
    int base, reserved;
} om_card_room;

/* Where a row is, and what it sees: tokens of its room up to its own, the last `window` of them where that is not 0; where `chunk`
 * is not 0, those of its own chunk of so many positions. */
typedef struct {
    const om_card_room *rooms; /* [T] */
    const int *positions;      /* [T]; rows of one sequence have positions that ascend by one, and the same pages */
    int window, chunk;
} om_card_view;

/* Tables of rotary angles by position, [positions, rotated dims], in the order of halves, as `om_rotate` takes them. */
typedef struct {
    const float *cos, *signed_sin;
} om_card_angles;

typedef struct {
    float greatest, sum;
} om_card_section;

/* What heads give for each section, in device memory: a longer context has other addresses. */
typedef struct {
    om_card_section *sections; /* [R, N, capacity] */
    float *sums;               /* [R, N, capacity, value dims] */
    int capacity, reserved;    /* sections that a row can have: as many as 512 times that are seen at most */
} om_card_attended;

/* query = the queries, and the caches get the keys and values of all rows: bias, norms, rotation, and the scale of queries. Grid:
 * N + 2 M, R. */
typedef struct {
    om_card_pass pass;
    om_card_view view;
    om_card_angles angles;  /* not read where nothing rotates */
    const float *heads[3];  /* query [T, N, D], or [T, N, 2, D] with a gate behind each head; key and value [T, M, D] */
    const float *biases[3]; /* [N, D], [M, D], [M, D], or NULL */
    const float *norms[2];  /* weights of the query's and the key's norm: [D], or of all heads [N, D] and [M, D] */
    float epsilons[2];
    float *query; /* [T, N, D]; not `heads[0]` */
    float scale_step, scale_strength; /* of queries: 1 + strength * log(1 + floor((position + 1) / step)); step 0: none */
    int is_gated, reserved;
} om_card_heads_params;

/* query = the queries in the space of latents, and the cache gets the latents and rotated keys of all rows. Grid:
 * N * OM_ABSORB_BLOCKS(Z) + R. */
typedef struct {
    om_card_pass pass;
    om_card_view view;
    om_card_angles angles;
    const float *heads;             /* [T, N, K + P] */
    const float *compressed;        /* [T, Z + P] */
    const float *biases[2];         /* of both, or NULL */
    const float *norm;              /* [Z] */
    const unsigned char *expansion; /* [N, K + V, Z]: latents to keys and values, plain numbers */
    float *query;                   /* [T, N, Z + P] */
    float epsilon;
} om_card_absorb_params;

/* Sections of all rows and heads: softmax and sums of values. Any grid; twice the card's multiprocessors. */
typedef struct {
    om_card_pass pass;
    om_card_view view;
    const float *query; /* [T, N, D], or [T, N, Z + P] */
    const om_card_attended *attended;
    float scaling;
} om_card_attend_params;

/* out = the means of values, and the same in int8. Grid: OM_MERGE_BLOCKS(N, D), R. */
typedef struct {
    om_card_pass pass;
    om_card_view view;
    const om_card_attended *attended;
    const float *sinks;      /* [N] or NULL */
    const float *gates;      /* [T, N, 2, D], whose second halves' sigmoids multiply the means; NULL: there are none */
    float *out;              /* [T, N, D], or NULL */
    om_card_input inputs[3]; /* by codec; NULL where it is not needed */
} om_card_merge_params;

/* out = the means of values, out of the means of latents, and the same in int8. Grid: OM_EXPAND_BLOCKS(N, V). */
typedef struct {
    om_card_pass pass;
    om_card_view view;
    const om_card_attended *attended;
    const unsigned char *expansion;
    float *out;              /* [T, N, V], or NULL */
    om_card_input inputs[3]; /* by codec; NULL where it is not needed */
} om_card_expand_params;

/* The states of a row's sequence in a layer of linear attention, in device memory: places, each with the inputs of a convolution
 * [2 G K + G S V, taps] and a state [G S, K, V]. */
typedef struct {
    float *inputs, *state;
} om_card_states;

/* out = gated delta rules behind their projections, and the same in int8. G heads of keys, S heads of values for each, K and V
 * their dims. Grid: OM_DELTA_BLOCKS(G, S * V), R. */
typedef struct {
    om_card_pass pass;
    const om_card_states *states; /* [T]; rows of one sequence follow each other and have the same */
    const int *reads, *leaves;    /* [T]: the place that a row reads, and the one that it leaves, which may be the same */
    const float *projected[6];    /* of the first row: queries, keys, values, gates, strengths, times */
    int row_strides[6];           /* numbers to those of the next row */
    int head_strides[4];          /* to those of the next head of keys: queries and keys, values, gates, strengths and times */
    const float *conv_weight;     /* [2 G K + G S V, taps] */
    const float *conv_bias;       /* [2 G K + G S V] or NULL */
    const float *decays;          /* [G S]: -exp(A_log) */
    const float *time_biases;     /* [G S] */
    const float *norm;            /* [V] */
    float *out;                   /* [T, G S V], or NULL */
    om_card_input inputs[3];      /* by codec; NULL where it is not needed */
    float epsilon;
    int reserved;
} om_card_delta_params;

/* ids [T, K] from the most to the least likely of each row's experts, and their weights. Grid: R. */
typedef struct {
    om_card_pass pass;
    const float *logits;     /* [T, E], biases included */
    const float *correction; /* [E] or NULL: added to the scores for the choice only */
    int *ids;
    float *weights;
    float scale; /* of the weights, applied last */
    float jitter; /* of a sparse mixer */
} om_card_route_params;

#define OM_HEADS_THREADS 128
#define OM_ABSORB_THREADS 128
#define OM_ABSORB_BLOCKS(rank) OM_CARD_UP(rank, 64)
#define OM_ATTEND_THREADS 256
#define OM_MERGE_THREADS 32
#define OM_MERGE_BLOCKS(num_heads, dims) OM_CARD_UP((num_heads) * (dims), 64)
#define OM_EXPAND_THREADS 256
#define OM_EXPAND_BLOCKS(num_heads, dims) OM_CARD_UP((num_heads) * (dims), 64)
#define OM_ROUTE_THREADS 256
/* `width`: features of a head of keys, a multiple of 16. A thread block has so many of these heads that it has whole blocks of 64. */
#define OM_DELTA_GROUP(width) ((width) % 64 == 0 ? 1 : (width) % 32 == 0 ? 2 : 4)
#define OM_DELTA_THREADS(width) OM_CARD_LEAST(OM_DELTA_GROUP(width) * (width), 256)
#define OM_DELTA_BLOCKS(num_key_heads, width) OM_CARD_UP(num_key_heads, OM_DELTA_GROUP(width))

#endif
