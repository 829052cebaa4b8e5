/* The interface for Python: the structs that it fills in, the functions that it calls, and shared constants.
 *
 * Each is written once. `abi.c` exports the three lists, and Python compares them with its own when it loads the library.
 * Raise OM_ABI_VERSION when a meaning changes that the lists do not show, or a struct of `cuda/pass.h`. */
#ifndef OM_API_H
#define OM_API_H

#include <stdint.h>

#define OM_ABI_VERSION 5

/* Fields are FIELD(struct, type, name, array dimension or nothing). */

/* The place of one matrix inside a record: byte offsets, -1 for planes that the codec lacks. */
#define OM_MATRIX_FIELDS(FIELD, T) \
    FIELD(T, int64_t, rows, ) FIELD(T, int64_t, cols, ) FIELD(T, int64_t, padded, ) \
    FIELD(T, int64_t, codes, ) FIELD(T, int64_t, scales, ) \
    FIELD(T, int64_t, nested_scales, ) FIELD(T, int64_t, nested_offset, ) FIELD(T, int64_t, bias, ) \
    FIELD(T, int64_t, part_rows, ) /* in panels, which begin anew after so many rows (plain numbers beside panels stay in row order); 0: in row order */ \
    FIELD(T, int32_t, codec, ) FIELD(T, int32_t, bias_dtype, )

#define OM_MOE_LAYER_FIELDS(FIELD, T) \
    FIELD(T, om_matrix, first, ) FIELD(T, om_matrix, second, ) \
    FIELD(T, om_matrix, up, ) /* in panels, of a type of its own; no rows: `first` has gate rows and then up rows */ \
    FIELD(T, int32_t, activation, ) FIELD(T, int32_t, has_gate, ) FIELD(T, int32_t, is_interleaved, ) \
    FIELD(T, float, alpha, ) FIELD(T, float, limit, )

/* What one row of activations, a token, attends to in one layer: `length` tokens before it, and itself behind them. */
#define OM_ROOM_FIELDS(FIELD, T) \
    FIELD(T, void *, keys, ) FIELD(T, void *, values, ) /* [M, capacity, D]; or latents [C, R] and rotated keys [C, P]; or several \
        of the inputs of a convolution and of the state of `om_delta_step`: the row reads number `capacity` and leaves number `length` */ \
    FIELD(T, int64_t, capacity, ) FIELD(T, int64_t, length, )

#define OM_ATTENTION_FIELDS(FIELD, T) \
    FIELD(T, om_matrix, matrices, [4]) /* query, key, value: one codec; output */ \
    FIELD(T, const uint8_t *, records, [4]) \
    FIELD(T, const float *, biases, [4]) /* those that are not in the records, or NULL */ \
    FIELD(T, const float *, norms, [2]) /* weights of the query's and the key's RMS norm, or NULL */ \
    FIELD(T, const float *, sinks, ) /* [N] or NULL */ \
    FIELD(T, int64_t, num_heads, ) FIELD(T, int64_t, num_kv_heads, ) \
    FIELD(T, int64_t, head_dim, ) FIELD(T, int64_t, rotated_dims, ) \
    FIELD(T, int64_t, norm_lengths, [2]) /* D: each head has its norm; more: one over all heads */ \
    FIELD(T, float, epsilons, [2]) \
    FIELD(T, float, scaling, ) \
    FIELD(T, float, scale_step, ) FIELD(T, float, scale_strength, ) /* see `query_scale`; a step of 0: queries are not scaled */ \
    FIELD(T, int32_t, is_normed_rotated, ) /* the norms come after the rotation */ \
    FIELD(T, int32_t, rotation, ) \
    FIELD(T, int32_t, cache_dtype, ) /* of keys and values */ \
    FIELD(T, int32_t, is_gated, ) /* the first matrix gives of each head its query, and then a gate of what it attends to */

/* Multi-head latent attention, absorbed: N heads of K unrotated and P rotated dims, values of V dims, latents of R. */
#define OM_LATENT_FIELDS(FIELD, T) \
    FIELD(T, om_matrix, matrices, [6]) /* the query, or its projection down; latent and rotated key; the query's projection up; */ \
    FIELD(T, const uint8_t *, records, [6]) /* keys to latents [N * R, K]; latents to keys and values [N * (K + V), R]; output */ \
    FIELD(T, const float *, biases, [6]) /* those that are not in the records, or NULL */ \
    FIELD(T, const float *, query_norm, ) /* weight of the RMS norm between the query's projections; NULL: it has one only */ \
    FIELD(T, const float *, latent_norm, ) \
    FIELD(T, float, query_epsilon, ) FIELD(T, float, latent_epsilon, ) \
    FIELD(T, int64_t, num_heads, ) FIELD(T, int64_t, unrotated_dims, ) FIELD(T, int64_t, rotated_dims, ) \
    FIELD(T, int64_t, value_dims, ) FIELD(T, int64_t, rank, ) \
    FIELD(T, float, scaling, ) \
    FIELD(T, int32_t, rotation, ) \
    FIELD(T, int32_t, cache_dtype, ) /* of latents and rotated keys */

#define OM_ROUTER_FIELDS(FIELD, T) \
    FIELD(T, om_matrix, matrix, ) /* [E, H] */ \
    FIELD(T, const uint8_t *, record, ) \
    FIELD(T, const float *, bias, ) /* [E] or NULL */ \
    FIELD(T, const float *, correction, ) /* [E] or NULL: added to the scores for the choice only */ \
    FIELD(T, int64_t, top_k, ) \
    FIELD(T, int64_t, num_groups, ) FIELD(T, int64_t, num_chosen_groups, ) /* of experts; experts of the other groups are not chosen */ \
    FIELD(T, int32_t, num_best, ) /* 1 or 2: scores of a group that are added up for the group's */ \
    FIELD(T, int32_t, is_sigmoid, ) /* scores are sigmoids of the logits, not their softmax */ \
    FIELD(T, int32_t, is_of_chosen, ) /* weights are shares among the chosen experts' scores */ \
    FIELD(T, int32_t, is_mixer, ) /* a weight is a share among those that are left and near */ \
    FIELD(T, float, jitter, ) /* of a mixer: near is a relative distance of up to twice that */ \
    FIELD(T, float, scale, ) /* of the weights, applied last */

#define OM_LAYER_FIELDS(FIELD, T) \
    FIELD(T, const om_attention *, attention, ) \
    FIELD(T, const om_latent *, latent, ) /* replaces `attention`, which is NULL then */ \
    FIELD(T, const om_linear_attention *, linear, ) /* likewise */ \
    FIELD(T, const om_router *, router, ) /* NULL: the block after the second norm has its own router */ \
    FIELD(T, const float *, norms, [2]) /* [hidden]: before attention, and before the router */ \
    FIELD(T, const float *, norm_biases, [2]) /* of layer norms; NULL: RMS norms */ \
    FIELD(T, float, epsilons, [2]) \
    FIELD(T, float, residual_scale, ) /* of what attention and experts add */ \
    FIELD(T, int64_t, hidden, )

/* A gated MLP that every token takes. */
#define OM_MLP_FIELDS(FIELD, T) \
    FIELD(T, om_matrix, matrices, [3]) /* gate and up [I, H], down [H, I], in the same order of rows */ \
    FIELD(T, const uint8_t *, records, [3]) \
    FIELD(T, int32_t, activation, )

#define OM_SHARED_FIELDS(FIELD, T) \
    FIELD(T, const om_mlp *, mlp, ) \
    FIELD(T, const float *, gate, ) /* [hidden] or NULL */ \
    FIELD(T, int64_t, hidden, )

#define OM_SPAN_LAYER_FIELDS(FIELD, T) \
    FIELD(T, const om_layer *, layer, ) /* with a router if it has experts */ \
    FIELD(T, const om_moe_layer *, experts, ) /* NULL: the layer is dense */ \
    FIELD(T, const om_mlp *, dense, ) /* of a dense layer */ \
    FIELD(T, const om_shared *, shared, ) /* NULL if the layer has none */ \
    FIELD(T, int64_t, first_key, ) /* the key of the layer's first expert */ \
    FIELD(T, float, weight_scale, ) \
    FIELD(T, int32_t, scales_inputs, ) /* weights multiply what experts are given, not what they give */

#define OM_SPAN_FIELDS(FIELD, T) \
    FIELD(T, const om_span_layer *, layers, ) \
    FIELD(T, int64_t, num_layers, ) FIELD(T, int64_t, hidden, ) \
    FIELD(T, const int64_t *, with_experts, ) /* the layers that have experts, ascending; elsewhere they are counted by themselves */ \
    FIELD(T, int64_t, num_with_experts, ) \
    FIELD(T, int64_t, num_experts, ) FIELD(T, int64_t, top_k, )

/* N rows: tokens of one sequence, one after the other, or of several. L layers have experts. */
#define OM_SPAN_ROWS_FIELDS(FIELD, T) \
    FIELD(T, int64_t, num_rows, ) /* 1 to OM_MAX_ROWS */ \
    FIELD(T, const float *, cos, ) FIELD(T, const float *, signed_sin, ) /* [N, rotated_dims] */ \
    FIELD(T, const om_room *, rooms, ) /* [layers, N]: of the dense ones, too */ \
    FIELD(T, float *, x, ) FIELD(T, float *, residual, ) FIELD(T, float *, normed, ) /* [N, H] */ \
    FIELD(T, float *, logits, ) FIELD(T, float *, weights, ) /* [L, N, E], [L, N, K] */ \
    FIELD(T, int64_t *, ids, ) /* [L, N, K] */ \
    FIELD(T, double *, times, ) /* [L, 2]: seconds since the start when the experts of a layer began and ended */ \
    FIELD(T, double *, stalls, ) /* [L]: seconds that a layer waited for experts */ \
    FIELD(T, float *, pairs, ) FIELD(T, float *, scaled, ) /* [N, K, H] each; what experts are given where it is scaled */ \
    FIELD(T, int64_t, num_ahead, ) /* following layers with experts whose routers are evaluated ahead, on the last row */ \
    FIELD(T, const int64_t *, ranks, ) /* [num_ahead]: how many of the likeliest guesses are fetched */ \
    FIELD(T, int64_t *, guesses, ) /* [L, num_ahead, K]: ids that these routers choose */ \
    FIELD(T, uint8_t *, found, ) FIELD(T, uint8_t *, guesses_found, ) /* [L, N, K], [L, num_ahead, K]: OM_HIT ... */ \
    FIELD(T, float *, guess_space, ) /* [H + E + K] */

#define OM_FILE_FIELDS(FIELD, T) \
    FIELD(T, const uint8_t *, pages, ) /* the mapped file, to look up which pages are cached; NULL where the system does not report it */ \
    FIELD(T, int64_t, num_bytes, ) \
    FIELD(T, int32_t, direct, ) FIELD(T, int32_t, cached, ) /* descriptors; -1: this way of reading is not available */

/* A run of bytes that a record is put together from. Direct reads need aligned windows: `start` and `num_bytes` of the slot are
 * filled from `offset` of the file on, and `length` bytes of that, from `skew` on, are then moved down to `target`. */
#define OM_PIECE_FIELDS(FIELD, T) \
    FIELD(T, int64_t, offset, ) FIELD(T, int64_t, start, ) FIELD(T, int64_t, num_bytes, ) \
    FIELD(T, int64_t, skew, ) FIELD(T, int64_t, length, ) FIELD(T, int64_t, target, ) \
    FIELD(T, int32_t, file, )

#define OM_PLACE_FIELDS(FIELD, T) \
    FIELD(T, int64_t, offset, ) FIELD(T, int64_t, num_bytes, ) \
    FIELD(T, const om_piece *, pieces, ) FIELD(T, int32_t, num_pieces, ) /* ascending in the slot, without a checksum; none: one run */ \
    FIELD(T, const om_matrix *, matrices, ) FIELD(T, int32_t, num_matrices, ) /* to bring into panels or rows; none: the record stays as it is */ \
    FIELD(T, int32_t, file, ) FIELD(T, int32_t, to_panels, ) \
    FIELD(T, uint32_t, checksum, )

/* A change of a read: a token pass has begun it (OM_READING), its expert has arrived (OM_DONE), its slot is reserved again
 * (OM_DROPPED), or it has failed and the slot belongs to Python, which may submit it again (OM_FAILED). */
#define OM_COMPLETION_FIELDS(FIELD, T) \
    FIELD(T, int64_t, key, ) \
    FIELD(T, int64_t, start, ) FIELD(T, int64_t, num_bytes, ) FIELD(T, int64_t, num_read, ) /* of the part that failed */ \
    FIELD(T, int32_t, slot, ) FIELD(T, int32_t, state, ) FIELD(T, int32_t, was_prefetch, ) \
    FIELD(T, int32_t, error, ) /* an errno, OM_SHORT_READ or OM_WRONG_CHECKSUM; 0 unless OM_FAILED */ \
    FIELD(T, int32_t, was_direct, ) /* whether the failed read was around the page cache */

#define OM_READS_OPTIONS_FIELDS(FIELD, T) \
    FIELD(T, int64_t, part_bytes, ) FIELD(T, int64_t, prefetch_part_bytes, ) \
    FIELD(T, int64_t, num_keys, ) \
    FIELD(T, const om_place *, places, ) /* by key; num_bytes is 0 until it is set: token passes do not fetch such experts */ \
    FIELD(T, uint8_t *, is_checked, ) /* by key: whether its checksum was compared; not read once a read went wrong */ \
    FIELD(T, int64_t *, counts, ) /* [2]: completions to drain, calls of `om_reads_wake` */ \
    FIELD(T, int64_t, scratch_bytes, ) /* that `om_repack` needs for these places */ \
    FIELD(T, int32_t, num_threads, )

/* X experts of the pool, M stored tokens, D features. */
#define OM_RANKING_FIELDS(FIELD, T) \
    FIELD(T, int64_t, num_keys, ) FIELD(T, int64_t, num_tokens, ) FIELD(T, int64_t, num_neighbours, ) /* X, M */ \
    FIELD(T, uint8_t *, used, ) FIELD(T, uint8_t *, was_used, ) FIELD(T, uint8_t *, future, ) /* [X], [X, M], [M, X] */ \
    FIELD(T, float *, matched, ) /* [M] */ \
    FIELD(T, float *, features, ) FIELD(T, float *, weights, ) /* [D, X], [D] */ \
    FIELD(T, double *, covariance, ) FIELD(T, double *, evidence, ) /* [D, D], [D] */ \
    FIELD(T, float *, worth, ) FIELD(T, float *, order, ) /* [X] */ \
    FIELD(T, const float *, absent, ) /* [X] */ \
    FIELD(T, float, sharpness, ) FIELD(T, float, shrinkage, )

#define OM_PASSED_FIELDS(FIELD, T) \
    FIELD(T, const int32_t *, keys, ) /* of experts that these layers used */ \
    FIELD(T, const float *, shares, ) /* of the tokens that used them */ \
    FIELD(T, int64_t, num_keys, ) \
    FIELD(T, int64_t, first, ) FIELD(T, int64_t, end, ) /* their experts */ \
    FIELD(T, float, decay, ) FIELD(T, float, matchable, ) \
    FIELD(T, float, slow_step, ) FIELD(T, float, fast_step, ) FIELD(T, float, discount, ) \
    FIELD(T, int32_t, observes, ) FIELD(T, int32_t, learns, )

/* A graphics card, as its driver describes it. */
#define OM_CARD_FIELDS(FIELD, T) \
    FIELD(T, int64_t, num_bytes, ) \
    FIELD(T, int32_t, device, ) FIELD(T, int32_t, num_cards, ) \
    FIELD(T, int32_t, driver_version, ) /* 1000 * major + 10 * minor of the CUDA that it has */ \
    FIELD(T, int32_t, major, ) FIELD(T, int32_t, minor, ) /* of its architecture */ \
    FIELD(T, int32_t, num_multiprocessors, ) FIELD(T, int32_t, core_khz, ) \
    FIELD(T, int32_t, memory_khz, ) FIELD(T, int32_t, memory_bits, ) /* 0 where it does not say */ \
    FIELD(T, int32_t, has_watchdog, ) /* a kernel that runs for seconds is ended */ \
    FIELD(T, int32_t, is_integrated, ) FIELD(T, int32_t, maps_host_memory, ) \
    FIELD(T, char, name, [128])

/* The first card in use: its primary context, and a stream for passes. */
#define OM_SESSION_FIELDS(FIELD, T) \
    FIELD(T, om_driver *, driver, ) \
    FIELD(T, void *, context, ) FIELD(T, void *, stream, ) \
    FIELD(T, int64_t, device, )

/* A launch of one kernel; `params` is its struct. */
#define OM_CARD_NODE_FIELDS(FIELD, T) \
    FIELD(T, void *, function, ) FIELD(T, const void *, params, ) \
    FIELD(T, int32_t, grid, [3]) FIELD(T, int32_t, num_threads, ) \
    FIELD(T, int32_t, after, [4]) /* earlier nodes of the same graph that it waits for; -1: none */

/* A layer's graphs, by their handles; those behind the router are NULL where it has none. */
#define OM_CARD_LAYER_FIELDS(FIELD, T) \
    FIELD(T, void *, attend, ) /* up to `resolve` */ \
    FIELD(T, void *, experts, ) /* queued: what is missing is fetched */ \
    FIELD(T, void *, hits, ) /* stepwise: only what is here */ \
    FIELD(T, const om_card_node *, resolve, ) FIELD(T, const om_card_node *, take, ) \
    FIELD(T, const om_moe_layer *, moe, ) /* its experts, for the CPU */ \
    FIELD(T, int64_t, first_key, ) FIELD(T, int64_t, top_k, ) \
    FIELD(T, int64_t, stride, ) /* rows of H that each row of a pass has among the experts' results */ \
    FIELD(T, float, weight_scale, ) \
    FIELD(T, int32_t, scales_inputs, ) /* weights multiply what the experts are given */

/* A pass for up to so many rows as its kernels were compiled for. */
#define OM_CARD_STEPS_FIELDS(FIELD, T) \
    FIELD(T, const om_card_layer *, layers, ) FIELD(T, int64_t, num_layers, ) \
    FIELD(T, void *, begin, ) FIELD(T, void *, ends, [3]) /* graphs; the last one by what the pass gives */ \
    FIELD(T, uint64_t, log, ) FIELD(T, int64_t, log_bytes, ) /* on the card */

#define OM_CARD_OPTIONS_FIELDS(FIELD, T) \
    FIELD(T, const om_session *, session, ) \
    FIELD(T, const om_card_node *, apply, ) \
    FIELD(T, void *, notice, ) FIELD(T, void *, edits, ) /* om_card_notice and om_card_edit[] in shared memory */ \
    FIELD(T, int64_t *, num_edits, ) /* of the list that is to be applied, which makes it 0 */ \
    FIELD(T, void *, host_log, ) /* page-locked */ \
    FIELD(T, om_slot_table *, ram, ) \
    FIELD(T, float *, host_normed, ) FIELD(T, float *, host_pairs, ) /* shared memory: [OM_MAX_ROWS, H], [OM_MAX_ROWS, stride, H] */ \
    FIELD(T, float *, scaled, ) /* [OM_MAX_ROWS * K, H], where inputs are scaled */ \
    FIELD(T, int64_t, hidden, )

/* In an order in which each uses only earlier ones. */
/* A gated delta rule behind its projections: H heads of values, fewer of keys. */
#define OM_DELTA_FIELDS(FIELD, T) \
    FIELD(T, const float *, conv_weight, ) FIELD(T, const float *, conv_bias, ) /* [channels, conv_length]; [channels] or NULL */ \
    FIELD(T, const float *, decays, ) FIELD(T, const float *, time_biases, ) /* [H]: -exp(A_log); dt_bias */ \
    FIELD(T, const float *, norm, ) /* [value_dim] */ \
    FIELD(T, int64_t, num_heads, ) FIELD(T, int64_t, num_key_heads, ) \
    FIELD(T, int64_t, key_dim, ) FIELD(T, int64_t, value_dim, ) /* multiples of 16, up to OM_MAX_DELTA_DIM */ \
    FIELD(T, int64_t, conv_length, ) FIELD(T, float, epsilon, )

/* A token's projections: of the first head of keys, and of the first of the heads that share it. */
#define OM_DELTA_INPUTS_FIELDS(FIELD, T) \
    FIELD(T, const float *, queries, ) FIELD(T, const float *, keys, ) FIELD(T, const float *, values, ) \
    FIELD(T, const float *, gates, ) FIELD(T, const float *, strengths, ) FIELD(T, const float *, times, ) \
    FIELD(T, int64_t, strides, [4]) /* to the next head of keys: queries and keys, values, gates, strengths and times */

/* Linear attention: projections of its input, its rule, and the projection of the output. */
#define OM_LINEAR_ATTENTION_FIELDS(FIELD, T) \
    FIELD(T, om_delta, rule, ) \
    FIELD(T, om_matrix, inputs, [4]) FIELD(T, const uint8_t *, records, [4]) \
    FIELD(T, int64_t, num_inputs, ) \
    FIELD(T, om_matrix, output, ) FIELD(T, const uint8_t *, output_record, ) \
    FIELD(T, int64_t, sources, [6]) FIELD(T, int64_t, offsets, [6]) /* of the fields of om_delta_inputs: the projection, the first row */ \
    FIELD(T, int64_t, strides, [4])

#define OM_STRUCTS(STRUCT) \
    STRUCT(om_matrix, OM_MATRIX_FIELDS) \
    STRUCT(om_moe_layer, OM_MOE_LAYER_FIELDS) \
    STRUCT(om_room, OM_ROOM_FIELDS) \
    STRUCT(om_attention, OM_ATTENTION_FIELDS) \
    STRUCT(om_latent, OM_LATENT_FIELDS) \
    STRUCT(om_delta, OM_DELTA_FIELDS) \
    STRUCT(om_delta_inputs, OM_DELTA_INPUTS_FIELDS) \
    STRUCT(om_linear_attention, OM_LINEAR_ATTENTION_FIELDS) \
    STRUCT(om_router, OM_ROUTER_FIELDS) \
    STRUCT(om_layer, OM_LAYER_FIELDS) \
    STRUCT(om_mlp, OM_MLP_FIELDS) \
    STRUCT(om_shared, OM_SHARED_FIELDS) \
    STRUCT(om_span_layer, OM_SPAN_LAYER_FIELDS) \
    STRUCT(om_span, OM_SPAN_FIELDS) \
    STRUCT(om_span_rows, OM_SPAN_ROWS_FIELDS) \
    STRUCT(om_file, OM_FILE_FIELDS) \
    STRUCT(om_piece, OM_PIECE_FIELDS) \
    STRUCT(om_place, OM_PLACE_FIELDS) \
    STRUCT(om_completion, OM_COMPLETION_FIELDS) \
    STRUCT(om_reads_options, OM_READS_OPTIONS_FIELDS) \
    STRUCT(om_ranking, OM_RANKING_FIELDS) \
    STRUCT(om_passed, OM_PASSED_FIELDS) \
    STRUCT(om_card, OM_CARD_FIELDS) \
    STRUCT(om_session, OM_SESSION_FIELDS) \
    STRUCT(om_card_node, OM_CARD_NODE_FIELDS) \
    STRUCT(om_card_layer, OM_CARD_LAYER_FIELDS) \
    STRUCT(om_card_steps, OM_CARD_STEPS_FIELDS) \
    STRUCT(om_card_options, OM_CARD_OPTIONS_FIELDS)

/* Documented at their definitions. */
#define OM_FUNCTIONS(FUNCTION) \
    FUNCTION(int, om_select, (const char *name)) \
    FUNCTION(const char *, om_active_name, (void)) \
    FUNCTION(int, om_configure_threads, (int num_threads, int is_pinned)) \
    FUNCTION(void, om_use_cores, (const int *cpus, int num_cpus)) \
    FUNCTION(int, om_num_threads, (void)) \
    FUNCTION(uint32_t, om_crc32, (const uint8_t *data, int64_t length, uint32_t crc)) \
    FUNCTION(void, om_encode_nf4, (const void *values, int32_t dtype, int64_t num_blocks, uint8_t *codes, float *absmax)) \
    FUNCTION(void, om_encode_int8, (const void *values, int32_t dtype, int64_t num_blocks, int8_t *codes, float *scales)) \
    FUNCTION(void, om_search_nf4, (const void *values, int32_t dtype, int64_t num_blocks, int64_t row_blocks, \
             const float *importance, uint8_t *codes, uint8_t *scale_codes, float *scales)) \
    FUNCTION(void, om_search_int8, (const void *values, int32_t dtype, int64_t num_blocks, int64_t row_blocks, \
             const float *importance, int8_t *codes, float *scales)) \
    FUNCTION(void, om_feed_back_nf4, (float *values, const float *scales, const float *feedback, int64_t num_rows, \
             uint8_t *codes)) \
    FUNCTION(void, om_encode_nested, (const float *absmax, float offset, int64_t count, uint8_t *codes, float *scales)) \
    FUNCTION(void, om_repack, (const om_matrix *matrices, int64_t num_matrices, uint8_t *record, int32_t to_panels, \
                               uint8_t *scratch)) \
    FUNCTION(int, om_linear_forward, (const om_matrix *matrices, const uint8_t *const *records, void *const *outs, \
                                      int64_t num_matrices, const void *x, int64_t num_tokens, int32_t x_dtype, \
                                      int32_t out_dtype)) \
    FUNCTION(int, om_moe_forward, (const om_moe_layer *layer, const void *x, int64_t num_tokens, int32_t x_dtype, \
                                   const uint8_t *const *records, const int32_t *offsets, const int32_t *token_ids, \
                                   const int32_t *out_ids, const float *pair_weights, int64_t num_experts, void *out, \
                                   int32_t out_dtype, int32_t accumulate)) \
    FUNCTION(void, om_sum_rows, (const float *pairs, int64_t num_rows, int64_t num_columns, void *out, int32_t out_dtype)) \
    FUNCTION(int, om_attention_step, (const om_attention *attention, const float *x, const float *cos, \
                                      const float *signed_sin, const om_room *rooms, int64_t num_rows, float *out)) \
    FUNCTION(int, om_attend_rows, (const om_attention *attention, const float *queries, const om_room *rooms, \
                                   int64_t num_rows, float *out)) \
    FUNCTION(int, om_latent_step, (const om_latent *latent, const float *x, const float *cos, const float *signed_sin, \
                                   const om_room *rooms, int64_t num_rows, float *out)) \
    FUNCTION(int, om_embed, (const void *table, int32_t codec, int64_t num_rows, int64_t hidden, const int64_t *ids, \
                             int64_t count, float scale, float *x)) \
    FUNCTION(void, om_delta_step, (const om_delta *layer, const om_delta_inputs *projected, float *inputs, float *state, float *out)) \
    FUNCTION(int, om_linear_attention_step, (const om_linear_attention *attention, const float *x, const om_room *rooms, \
                                             int64_t num_rows, float *out)) \
    FUNCTION(void, om_norm, (const float *values, const float *weight, const float *bias, int64_t num_rows, int64_t length, \
                             float epsilon, float *result)) \
    FUNCTION(int, om_router_step, (const om_router *router, const float *x, int64_t num_rows, float *logits, \
                                   float *weights, int64_t *ids)) \
    FUNCTION(int, om_layer_step, (const om_layer *layer, const float *x, const float *cos, const float *signed_sin, \
                                  const om_room *rooms, int64_t num_rows, float *residual, float *normed, \
                                  float *logits, float *weights, int64_t *ids)) \
    FUNCTION(int, om_mlp_forward, (const om_mlp *mlp, const void *x, int64_t num_tokens, int32_t x_dtype, void *out, \
                                   int32_t out_dtype)) \
    FUNCTION(int, om_add_shared, (const om_shared *shared, const float *x, int64_t num_rows, float *out)) \
    FUNCTION(om_slot_table *, om_slot_table_open, (const uint8_t **records, int32_t *leases, int32_t *slots)) \
    FUNCTION(void, om_slot_table_close, (om_slot_table *slot_table)) \
    FUNCTION(void, om_slot_table_resize, (om_slot_table *slot_table, int64_t *keys, uint8_t *states, int64_t num_slots)) \
    FUNCTION(int, om_slot_table_admit, (om_slot_table *slot_table, int64_t key, int32_t slot)) \
    FUNCTION(void, om_slot_table_arrived, (om_slot_table *slot_table, int32_t slot, const uint8_t *record)) \
    FUNCTION(void, om_slot_table_loaded, (om_slot_table *slot_table, int32_t slot, const uint8_t *record)) \
    FUNCTION(int, om_slot_table_vacate, (om_slot_table *slot_table, int32_t slot, int32_t state)) \
    FUNCTION(void, om_slot_table_lease, (om_slot_table *slot_table, const int64_t *keys, int64_t num_keys, uint8_t *is_here)) \
    FUNCTION(void, om_slot_table_release, (om_slot_table *slot_table, const int64_t *keys, int64_t num_keys)) \
    FUNCTION(om_reads *, om_reads_open, (om_slot_table *slot_table, const om_reads_options *options)) \
    FUNCTION(int, om_reads_close, (om_reads *reads, double limit_s)) \
    FUNCTION(void, om_reads_leave, (om_reads *reads)) \
    FUNCTION(int, om_reads_use_file, (om_reads *reads, int32_t number, const om_file *file)) \
    FUNCTION(int64_t, om_read_file, (int32_t file, uint8_t *to, int64_t num_bytes, int64_t offset)) \
    FUNCTION(void, om_reads_read_with, (om_reads *reads, om_read_at *read_at)) \
    FUNCTION(int, om_reads_submit, (om_reads *reads, int64_t key, int32_t slot, uint8_t *record, int is_prefetch)) \
    FUNCTION(void, om_reads_demand, (om_reads *reads, int64_t key)) \
    FUNCTION(int, om_reads_cancel, (om_reads *reads, int64_t key)) \
    FUNCTION(void, om_reads_reserve, (om_reads *reads, int32_t slot, uint8_t *record)) \
    FUNCTION(void, om_reads_need_below, (om_reads *reads, int32_t least_spares)) \
    FUNCTION(int32_t, om_reads_reclaim, (om_reads *reads)) \
    FUNCTION(int64_t, om_reads_completions, (om_reads *reads, om_completion *completions, int64_t room)) \
    FUNCTION(void, om_reads_wait, (om_reads *reads, int64_t num_wakes, double limit_s)) \
    FUNCTION(void, om_reads_wake, (om_reads *reads)) \
    FUNCTION(int, om_reads_attend, (om_reads *reads, double limit_s)) \
    FUNCTION(void, om_reads_notice, (om_reads *reads)) \
    FUNCTION(int64_t, om_span_pass, (const om_span *span, const om_span_rows *rows, om_slot_table *slot_table)) \
    FUNCTION(om_pass *, om_pass_start, (const om_span *span, const om_span_rows *rows, om_slot_table *slot_table, \
                                        om_reads *reads)) \
    FUNCTION(int64_t, om_pass_next, (om_pass *pass, int64_t first, double limit_s, int32_t *needs)) \
    FUNCTION(void, om_pass_end, (om_pass *pass)) \
    FUNCTION(void, om_rank, (const om_ranking *r, const om_passed *passed, int64_t count)) \
    FUNCTION(om_driver *, om_driver_open, (const char *path, char *reason, int64_t room)) \
    FUNCTION(void, om_driver_close, (om_driver *driver)) \
    FUNCTION(void, om_driver_describe, (const om_driver *driver, int32_t code, char *text, int64_t room)) \
    FUNCTION(int, om_card_describe, (const om_driver *driver, int number, om_card *card)) \
    FUNCTION(int, om_driver_is_lost, (int code)) \
    FUNCTION(int, om_session_open, (om_driver *driver, int32_t device, om_session *session)) \
    FUNCTION(void, om_session_close, (om_session *session)) \
    FUNCTION(int, om_session_allocate, (const om_session *session, int64_t num_bytes, uint64_t *address)) \
    FUNCTION(int, om_session_free, (const om_session *session, uint64_t address)) \
    FUNCTION(int, om_session_allocate_shared, (const om_session *session, int64_t num_bytes, void **at, uint64_t *address)) \
    FUNCTION(int, om_session_free_shared, (const om_session *session, void *at)) \
    FUNCTION(int, om_session_lock, (const om_session *session, void *at, int64_t num_bytes)) \
    FUNCTION(int, om_session_unlock, (const om_session *session, void *at)) \
    FUNCTION(int, om_session_address_of, (const om_session *session, void *at, uint64_t *address)) \
    FUNCTION(int, om_session_upload, (const om_session *session, uint64_t to, const void *from, int64_t num_bytes)) \
    FUNCTION(int, om_session_download, (const om_session *session, void *to, uint64_t from, int64_t num_bytes)) \
    FUNCTION(int, om_session_load, (const om_session *session, const void *image, void **module)) \
    FUNCTION(int, om_session_unload, (const om_session *session, void *module)) \
    FUNCTION(int, om_session_function, (const om_session *session, void *module, const char *name, void **function)) \
    FUNCTION(int, om_session_synchronize, (const om_session *session)) \
    FUNCTION(int64_t, om_card_graph, (const om_session *session, const om_card_node *nodes, int64_t num_nodes, void **executable)) \
    FUNCTION(void, om_card_graph_free, (const om_session *session, void *executable)) \
    FUNCTION(om_device_pass *, om_card_open, (const om_card_options *options)) \
    FUNCTION(void, om_card_close, (om_device_pass *pass)) \
    FUNCTION(int64_t, om_card_begin, (om_device_pass *pass, const om_card_steps *steps, int64_t num_rows, int32_t is_stepwise, \
                                      int32_t gives)) \
    FUNCTION(int64_t, om_card_next, (om_device_pass *pass, double limit_s)) \
    FUNCTION(int64_t, om_card_continue, (om_device_pass *pass, int32_t is_stepwise)) \
    FUNCTION(int64_t, om_card_run_between, (om_device_pass *pass, void *graph)) \
    FUNCTION(int64_t, om_card_cancel, (om_device_pass *pass)) \
    FUNCTION(int32_t, om_card_number, (const om_device_pass *pass)) \
    FUNCTION(double, om_card_cpu_seconds, (const om_device_pass *pass)) \
    FUNCTION(int64_t, om_card_num_on_cpu, (const om_device_pass *pass))

enum { OM_NF4 = 0, OM_INT8 = 1, OM_MXFP4 = 2, OM_BF16 = 3, OM_FP32 = 4, OM_FP16 = 5 };
/* Types of GGUF files: blocks of 32 weights, then superblocks of 256. */
enum { OM_Q4_0 = 6, OM_Q4_1 = 7, OM_Q5_0 = 8, OM_Q5_1 = 9, OM_Q8_0 = 10, OM_IQ4_NL = 11, OM_GGUF_MXFP4 = 12,
       OM_Q2_K = 13, OM_Q3_K = 14, OM_Q4_K = 15, OM_Q5_K = 16, OM_Q6_K = 17, OM_IQ4_XS = 18, OM_NUM_CODECS = 19 };
enum { OM_F32 = 0, OM_BF16_VALUES = 1 };
enum { OM_SILU = 0, OM_GELU = 1, OM_GELU_TANH = 2, OM_GPT_OSS = 3, OM_RELU = 4, OM_RELU2 = 5, OM_IDENTITY = 6 };
enum { OM_SLOT_FREE = 0, OM_SLOT_LOADING = 1, OM_SLOT_RESIDENT = 2, OM_SLOT_RESERVED = 3, OM_SLOT_ARRIVED = 4 };
enum { OM_READING = 1, OM_DONE = 2, OM_DROPPED = 3, OM_FAILED = 4 };
enum { OM_SHORT_READ = -1, OM_WRONG_CHECKSUM = -2 }; /* errors beside those of errno */
/* The dims of a rotated part that turn together, and their places afterwards. */
enum { OM_HALVES = 0, OM_PAIRS_TO_HALVES = 1, OM_PAIRS = 2 };
/* How an expert was found when it was chosen, or guessed. */
enum { OM_HIT = 0, OM_ARRIVING = 1, OM_MISSING = 2, OM_FETCHED = 3 /* guessed, absent, and fetched */ };
/* Needs of a layer that Python serves: experts that could not be fetched; slots, of which few are left. */
enum { OM_NEEDS_EXPERTS = 1, OM_NEEDS_SLOTS = 2 };
/* Results in place of a layer or a number of layers. */
enum { OM_UNDER_WAY = -2 };
/* What a pass of a card gives behind its last norm: what the norm gives alone, or logits, or the tokens that it chooses from them. */
enum { OM_GIVES_HIDDEN = 0, OM_GIVES_LOGITS = 1, OM_GIVES_TOKENS = 2 };

#define OM_BLOCK 64     /* weights that share an nf4 or int8 scale, and activations that share an int8 scale */
#define OM_MAX_TOP_K 64 /* experts of one token and layer in a span */
#define OM_MAX_ROWS 8   /* tokens that a span takes at once: `OM_TILE` */
#define OM_MAX_ROTATED 256 /* dims that turn as pairs, or in latent attention */
#define OM_MAX_DELTA_DIM 256
#define OM_MAX_SCORED 1024 /* experts of a layer whose router scores all of them */

#define OM_CONSTANTS(CONSTANT) \
    CONSTANT(OM_NF4) CONSTANT(OM_INT8) CONSTANT(OM_MXFP4) CONSTANT(OM_BF16) CONSTANT(OM_FP32) CONSTANT(OM_FP16) \
    CONSTANT(OM_Q4_0) CONSTANT(OM_Q4_1) CONSTANT(OM_Q5_0) CONSTANT(OM_Q5_1) CONSTANT(OM_Q8_0) CONSTANT(OM_IQ4_NL) CONSTANT(OM_GGUF_MXFP4) \
    CONSTANT(OM_Q2_K) CONSTANT(OM_Q3_K) CONSTANT(OM_Q4_K) CONSTANT(OM_Q5_K) CONSTANT(OM_Q6_K) CONSTANT(OM_IQ4_XS) \
    CONSTANT(OM_F32) CONSTANT(OM_BF16_VALUES) \
    CONSTANT(OM_SILU) CONSTANT(OM_GELU) CONSTANT(OM_GELU_TANH) CONSTANT(OM_GPT_OSS) CONSTANT(OM_RELU) CONSTANT(OM_RELU2) \
    CONSTANT(OM_IDENTITY) \
    CONSTANT(OM_HALVES) CONSTANT(OM_PAIRS_TO_HALVES) CONSTANT(OM_PAIRS) \
    CONSTANT(OM_SLOT_FREE) CONSTANT(OM_SLOT_LOADING) CONSTANT(OM_SLOT_RESIDENT) CONSTANT(OM_SLOT_RESERVED) \
    CONSTANT(OM_SLOT_ARRIVED) \
    CONSTANT(OM_READING) CONSTANT(OM_DONE) CONSTANT(OM_DROPPED) CONSTANT(OM_FAILED) \
    CONSTANT(OM_SHORT_READ) CONSTANT(OM_WRONG_CHECKSUM) \
    CONSTANT(OM_HIT) CONSTANT(OM_ARRIVING) CONSTANT(OM_MISSING) CONSTANT(OM_FETCHED) \
    CONSTANT(OM_NEEDS_EXPERTS) CONSTANT(OM_NEEDS_SLOTS) CONSTANT(OM_UNDER_WAY) \
    CONSTANT(OM_GIVES_HIDDEN) CONSTANT(OM_GIVES_LOGITS) CONSTANT(OM_GIVES_TOKENS) \
    CONSTANT(OM_BLOCK) CONSTANT(OM_MAX_TOP_K) CONSTANT(OM_MAX_ROWS) CONSTANT(OM_MAX_SCORED) CONSTANT(OM_MAX_ROTATED) \
    CONSTANT(OM_MAX_DELTA_DIM)

typedef struct om_slot_table om_slot_table; /* opaque to Python, which keeps their addresses */
typedef struct om_reads om_reads;
typedef struct om_pass om_pass;
typedef struct om_driver om_driver;
typedef struct om_device_pass om_device_pass;

/* Reads at an offset. Returns bytes, fewer at the end of the file, or a negative number of errno. */
typedef int64_t om_read_at(int32_t descriptor, uint8_t *to, int64_t num_bytes, int64_t offset);

#define OM_DECLARE_FIELD(T, type, name, dimension) type name dimension;
#define OM_DECLARE_STRUCT(T, FIELDS) \
    typedef struct T T; \
    struct T { FIELDS(OM_DECLARE_FIELD, T) };
#define OM_DECLARE_FUNCTION(result, name, parameters) OM_EXPORT result name parameters;

OM_STRUCTS(OM_DECLARE_STRUCT)
OM_FUNCTIONS(OM_DECLARE_FUNCTION)

#endif
