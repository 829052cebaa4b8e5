/* What a pass of the card keeps in device memory, and the parameters of the kernels that decide residency:
 * docs/decisions/103-device-pass.md. For the readers of `params.h`.
 *
 * T rows, K experts of a row, P = R * K pairs, L layers, H hidden. */
#ifndef OM_CARD_PASS_H
#define OM_CARD_PASS_H

#include "params.h"

#define OM_CARD_ROWS 8
#define OM_CARD_PAIRS 512 /* 8 rows of 64 experts */
#define OM_CARD_EMPTY (-1) /* a slot of the device without an expert */
#define OM_CARD_HOSTS (-2) /* a slot that the host fills, or that is not there any more */
#define OM_CARD_SLOT_BITS 24
#define OM_CARD_MOST_WORTH 255

/* Why a pass has stopped. */
#define OM_STOP_MISSING 1  /* an expert has no source */
#define OM_STOP_SLOTS 2    /* a layer's experts are more than the device's slots */

/* How a pass treats what is missing. */
#define OM_CARD_QUEUED 0   /* the device fetches it */
#define OM_CARD_STEPWISE 1 /* the host computes it */

/* How a pair's expert was found, in the log. */
#define OM_CARD_HIT 0
#define OM_CARD_MISSED 2 /* OM_MISSING of the CPU's pass */

typedef struct {
    int stop;       /* 0, or why */
    int num_rows;   /* T */
    int mode;
    int token;      /* of this pass; the last kernel advances it */
    int num_owned;  /* slots of the device */
    int num_slots;  /* those from this one on are the host's; as many as keys at most */
    int positions[OM_CARD_ROWS]; /* of each row in its sequence */
    int advance[OM_CARD_ROWS];   /* what the last kernel adds to them */
    int tokens[OM_CARD_ROWS];    /* of the pass; behind it, those that it has chosen */
    int reads[OM_CARD_ROWS];     /* places of the states of linear attention: those that a row reads, */
    int leaves[OM_CARD_ROWS];    /* and those that it leaves, in all layers */
    om_card_sampling draws[OM_CARD_ROWS];
} om_card_state;

/* Written by `apply`, `resolve` and `admit`, and by nothing else. Slots: as many as keys, since the pool may grow. */
typedef struct {
    int *slot_of;                  /* [keys]; -1: not resident */
    int *key_of;                   /* [slots]: a key, OM_CARD_EMPTY or OM_CARD_HOSTS */
    unsigned *used;                /* [slots]: the stamp of the layer that used it last */
    unsigned char *worth;          /* [keys], whole groups of 8: by the host's policy */
    const om_card_address *memory; /* [slots] */
    om_card_address *source;       /* [keys]: a complete, checked record in page-locked memory; 0: none */
} om_card_tables;

/* In mapped memory of the host, which reads it. */
typedef struct {
    volatile unsigned stamp; /* of the layer whose router has chosen; written last */
    volatile int stop;
    volatile int layer;
    volatile int done;       /* the token whose last kernel has run */
    volatile int tokens[OM_CARD_ROWS]; /* chosen by that pass */
    volatile int ids[OM_CARD_PAIRS];   /* [T, K] of that layer */
    volatile int found[OM_CARD_PAIRS];
    volatile float weights[OM_CARD_PAIRS];
} om_card_notice;

/* A layer's part of the log, ints: token, changes, then of R * K pairs ids, weights as bits, how they were found, and of up to
 * R * K changes slot, key evicted (or OM_CARD_EMPTY), key admitted. */
#define OM_CARD_LOG_HEAD 2
#define OM_CARD_LOG_INTS(num_pairs) (OM_CARD_LOG_HEAD + 6 * (num_pairs))

/* A change of one number that the host makes; no two of one list have the same kind and index. */
typedef struct {
    int kind, index;
    om_card_address value;
} om_card_edit;
#define OM_EDIT_SLOT_OF 0
#define OM_EDIT_KEY_OF 1
#define OM_EDIT_USED 2
#define OM_EDIT_SOURCE 3
#define OM_EDIT_POSITION 4
#define OM_EDIT_ADVANCE 5
#define OM_EDIT_TOKEN 6
#define OM_EDIT_ROWS 7
#define OM_EDIT_MODE 8
#define OM_EDIT_OWNED 9
#define OM_EDIT_STOP 10
#define OM_EDIT_PASS 11 /* its number */
#define OM_EDIT_TEMPERATURE 12 /* the bits of an fp32 number, as of the next one */
#define OM_EDIT_TOP_P 13
#define OM_EDIT_TOP_K 14
#define OM_EDIT_SEED 15
#define OM_EDIT_WORTHS 16 /* a group of 8 keys */
#define OM_EDIT_MOVE 17   /* the place that a row reads, and, 32 bits higher, the one that it leaves */
#define OM_EDIT_SLOTS 18

/* Grid: OM_CARD_UP(num_edits, OM_APPLY_THREADS). It runs when the pass is stopped, too. */
typedef struct {
    om_card_state *state;
    om_card_tables tables;
    const om_card_edit *edits; /* mapped memory of the host */
    int num_edits, reserved;
} om_card_apply_params;

/* Which of a layer's experts are here. Grid: 1. */
typedef struct {
    om_card_pass pass;
    om_card_state *state;
    om_card_tables tables;
    const int *ids;       /* [T, K] */
    const float *weights; /* [T, K] */
    om_card_address *hits; /* [R, K]: addresses of those that are here, 0 of the others */
    int *log;
    om_card_notice *notice;
    const float *normed;  /* [T, H] */
    float *host_normed;   /* mapped memory: written in stepwise mode where experts are missing */
    int first_key, layer, num_layers, top_k, max_rows, hidden;
} om_card_resolve_params;

/* What `fetch` copies. */
typedef struct {
    int count, reserved;
    om_card_address source[OM_CARD_PAIRS], slot[OM_CARD_PAIRS];
} om_card_fetches;

/* Slots for those that are missing, of what is worth least; of equals, of what was used longest ago. Grid: 1. */
typedef struct {
    om_card_pass pass;
    om_card_state *state;
    om_card_tables tables;
    const int *ids;
    const om_card_address *hits;
    om_card_address *fetched; /* [R, K]: addresses of those that were missing, 0 of the others */
    om_card_fetches *fetches;
    int *log;
    int first_key, layer, num_layers, top_k, max_rows, reserved;
} om_card_admit_params;

/* Their records, from the host's memory into the slots. Grid: OM_FETCH_BLOCKS, R * K. */
typedef struct {
    om_card_pass pass;
    const om_card_fetches *fetches;
    long long record_bytes; /* a multiple of 16 */
} om_card_fetch_params;

/* Rows that the host has computed, into those of the experts: pairs [T, stride, H] of rows with hits of 0. Grid: R * K. */
typedef struct {
    om_card_pass pass;
    const int *ids;
    const om_card_address *hits;
    const float *host_pairs; /* mapped memory, [T, stride, H] */
    float *pairs;
    int top_k, stride, hidden, reserved;
} om_card_take_params;

/* The end of a pass. Grid: 1. */
typedef struct {
    om_card_pass pass;
    om_card_state *state;
    om_card_notice *notice;
} om_card_finish_params;

#define OM_APPLY_THREADS 256
#define OM_RESOLVE_THREADS 256
#define OM_ADMIT_THREADS 256
#define OM_FETCH_THREADS 256
#define OM_FETCH_BLOCKS 16
#define OM_TAKE_THREADS 128
#define OM_FINISH_THREADS 32

#endif
