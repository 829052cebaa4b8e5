"""The structs of the native library for ctypes; `csrc/api.h` documents them under the names given here."""

import ctypes


class MatrixStruct(ctypes.Structure):
    """`om_matrix`: offsets of one matrix inside a record; -1 marks planes that the codec lacks."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "cols", "padded", "codes", "scales")),
        *((name, ctypes.c_int64) for name in ("nested_scales", "nested_offset", "bias", "part_rows")),
        *((name, ctypes.c_int32) for name in ("codec", "bias_dtype")),
    )


class MoeLayerStruct(ctypes.Structure):
    """`om_moe_layer`."""

    _fields_ = (
        ("first", MatrixStruct),
        ("second", MatrixStruct),
        ("up", MatrixStruct),
        *((name, ctypes.c_int32) for name in ("activation", "has_gate", "is_interleaved")),
        *((name, ctypes.c_float) for name in ("alpha", "limit")),
    )


class RoomStruct(ctypes.Structure):
    """`om_room`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("capacity", "length")),
    )


class AttentionStruct(ctypes.Structure):
    """`om_attention`."""

    _fields_ = (
        ("matrices", MatrixStruct * 4),
        ("records", ctypes.c_void_p * 4),
        ("biases", ctypes.c_void_p * 4),
        ("norms", ctypes.c_void_p * 2),
        ("sinks", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim", "rotated_dims")),
        ("norm_lengths", ctypes.c_int64 * 2),
        ("epsilons", ctypes.c_float * 2),
        *((name, ctypes.c_float) for name in ("scaling", "scale_step", "scale_strength")),
        *((name, ctypes.c_int32) for name in ("is_normed_rotated", "rotation", "cache_dtype", "is_gated")),
    )


class DeltaStruct(ctypes.Structure):
    """`om_delta`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("conv_weight", "conv_bias", "decays", "time_biases", "norm")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_key_heads", "key_dim", "value_dim", "conv_length")),
        ("epsilon", ctypes.c_float),
    )


class DeltaInputsStruct(ctypes.Structure):
    """`om_delta_inputs`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "values", "gates", "strengths", "times")),
        ("strides", ctypes.c_int64 * 4),
    )


class LinearAttentionStruct(ctypes.Structure):
    """`om_linear_attention`."""

    _fields_ = (
        ("rule", DeltaStruct),
        ("inputs", MatrixStruct * 4),
        ("records", ctypes.c_void_p * 4),
        ("num_inputs", ctypes.c_int64),
        ("output", MatrixStruct),
        ("output_record", ctypes.c_void_p),
        *((name, ctypes.c_int64 * 6) for name in ("sources", "offsets")),
        ("strides", ctypes.c_int64 * 4),
    )


class LatentStruct(ctypes.Structure):
    """`om_latent`."""

    _fields_ = (
        ("matrices", MatrixStruct * 6),
        ("records", ctypes.c_void_p * 6),
        ("biases", ctypes.c_void_p * 6),
        *((name, ctypes.c_void_p) for name in ("query_norm", "latent_norm")),
        *((name, ctypes.c_float) for name in ("query_epsilon", "latent_epsilon")),
        *((name, ctypes.c_int64) for name in ("num_heads", "unrotated_dims", "rotated_dims", "value_dims", "rank")),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("rotation", "cache_dtype")),
    )


class RouterStruct(ctypes.Structure):
    """`om_router`."""

    _fields_ = (
        ("matrix", MatrixStruct),
        *((name, ctypes.c_void_p) for name in ("record", "bias", "correction")),
        *((name, ctypes.c_int64) for name in ("top_k", "num_groups", "num_chosen_groups")),
        *((name, ctypes.c_int32) for name in ("num_best", "is_sigmoid", "is_of_chosen", "is_mixer")),
        *((name, ctypes.c_float) for name in ("jitter", "scale")),
    )


class LayerStruct(ctypes.Structure):
    """`om_layer`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention", "latent", "linear", "router")),
        ("norms", ctypes.c_void_p * 2),
        ("norm_biases", ctypes.c_void_p * 2),
        ("epsilons", ctypes.c_float * 2),
        ("residual_scale", ctypes.c_float),
        ("hidden", ctypes.c_int64),
    )


class MlpStruct(ctypes.Structure):
    """`om_mlp`."""

    _fields_ = (
        ("matrices", MatrixStruct * 3),
        ("records", ctypes.c_void_p * 3),
        ("activation", ctypes.c_int32),
    )


class SharedStruct(ctypes.Structure):
    """`om_shared`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("mlp", "gate")),
        ("hidden", ctypes.c_int64),
    )


class SpanLayerStruct(ctypes.Structure):
    """`om_span_layer`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layer", "experts", "dense", "shared")),
        ("first_key", ctypes.c_int64),
        ("weight_scale", ctypes.c_float),
        ("scales_inputs", ctypes.c_int32),
    )


class SpanStruct(ctypes.Structure):
    """`om_span`."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden")),
        ("with_experts", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_with_experts", "num_experts", "top_k")),
    )


class SpanRowsStruct(ctypes.Structure):
    """`om_span_rows`."""

    _fields_ = (
        ("num_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cos", "signed_sin", "rooms")),
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "residual", "normed", "logits", "weights", "ids", "times", "stalls", "pairs", "scaled")
        ),
        ("num_ahead", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("ranks", "guesses", "found", "guesses_found", "guess_space")),
    )


class PieceStruct(ctypes.Structure):
    """`om_piece`: a part of a record that is put together from other files, and the window that is read for it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("offset", "start", "num_bytes", "skew", "length", "target")),
        ("file", ctypes.c_int32),
    )


class PlaceStruct(ctypes.Structure):
    """`om_place`: the place of an expert's record, the number of its file, and the change of its order on arrival."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("offset", "num_bytes")),
        ("pieces", ctypes.c_void_p),
        ("num_pieces", ctypes.c_int32),
        ("matrices", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("num_matrices", "file", "to_panels")),
        ("checksum", ctypes.c_uint32),
    )


class FileStruct(ctypes.Structure):
    """`om_file`. direct: -1 if it cannot be read around the page cache. pages: its mapping, or 0."""

    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("num_bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("direct", "cached")),
    )


class ReadsOptionsStruct(ctypes.Structure):
    """`om_reads_options`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("part_bytes", "prefetch_part_bytes", "num_keys")),
        *((name, ctypes.c_void_p) for name in ("places", "is_checked", "counts")),
        ("scratch_bytes", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
    )


class CompletionStruct(ctypes.Structure):
    """`om_completion`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("key", "start", "num_bytes", "num_read")),
        *((name, ctypes.c_int32) for name in ("slot", "state", "was_prefetch", "error", "was_direct")),
    )


class RankingStruct(ctypes.Structure):
    """`om_ranking`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_keys", "num_tokens", "num_neighbours")),
        *((name, ctypes.c_void_p) for name in ("used", "was_used", "future", "matched")),
        *((name, ctypes.c_void_p) for name in ("features", "weights", "covariance", "evidence")),
        *((name, ctypes.c_void_p) for name in ("worth", "order", "absent")),
        *((name, ctypes.c_float) for name in ("sharpness", "shrinkage")),
    )


class PassedStruct(ctypes.Structure):
    """`om_passed`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "shares")),
        *((name, ctypes.c_int64) for name in ("num_keys", "first", "end")),
        *((name, ctypes.c_float) for name in ("decay", "matchable", "slow_step", "fast_step", "discount")),
        *((name, ctypes.c_int32) for name in ("observes", "learns")),
    )


class CardStruct(ctypes.Structure):
    """`om_card`."""

    _fields_ = (
        ("num_bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("device", "num_cards", "driver_version", "major", "minor")),
        *((name, ctypes.c_int32) for name in ("num_multiprocessors", "core_khz", "memory_khz", "memory_bits")),
        *((name, ctypes.c_int32) for name in ("has_watchdog", "is_integrated", "maps_host_memory")),
        ("name", ctypes.c_char * 128),
    )


class SessionStruct(ctypes.Structure):
    """`om_session`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("driver", "context", "stream")),
        ("device", ctypes.c_int64),
    )


class CardNodeStruct(ctypes.Structure):
    """`om_card_node`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("function", "params")),
        ("grid", ctypes.c_int32 * 3),
        ("num_threads", ctypes.c_int32),
        ("after", ctypes.c_int32 * 4),
    )


class CardLayerStruct(ctypes.Structure):
    """`om_card_layer`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attend", "experts", "hits", "resolve", "take", "moe")),
        *((name, ctypes.c_int64) for name in ("first_key", "top_k", "stride")),
        ("weight_scale", ctypes.c_float),
        ("scales_inputs", ctypes.c_int32),
    )


class CardStepsStruct(ctypes.Structure):
    """`om_card_steps`."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("num_layers", ctypes.c_int64),
        ("begin", ctypes.c_void_p),
        ("ends", ctypes.c_void_p * 3),
        ("log", ctypes.c_uint64),
        ("log_bytes", ctypes.c_int64),
    )


class CardOptionsStruct(ctypes.Structure):
    """`om_card_options`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("session", "apply", "notice", "edits", "num_edits", "host_log", "ram")),
        *((name, ctypes.c_void_p) for name in ("host_normed", "host_pairs", "scaled")),
        ("hidden", ctypes.c_int64),
    )


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "om_matrix": MatrixStruct,
    "om_moe_layer": MoeLayerStruct,
    "om_room": RoomStruct,
    "om_attention": AttentionStruct,
    "om_latent": LatentStruct,
    "om_delta": DeltaStruct,
    "om_delta_inputs": DeltaInputsStruct,
    "om_linear_attention": LinearAttentionStruct,
    "om_router": RouterStruct,
    "om_layer": LayerStruct,
    "om_mlp": MlpStruct,
    "om_shared": SharedStruct,
    "om_span_layer": SpanLayerStruct,
    "om_span": SpanStruct,
    "om_span_rows": SpanRowsStruct,
    "om_file": FileStruct,
    "om_piece": PieceStruct,
    "om_place": PlaceStruct,
    "om_completion": CompletionStruct,
    "om_reads_options": ReadsOptionsStruct,
    "om_ranking": RankingStruct,
    "om_passed": PassedStruct,
    "om_card": CardStruct,
    "om_session": SessionStruct,
    "om_card_node": CardNodeStruct,
    "om_card_layer": CardLayerStruct,
    "om_card_steps": CardStepsStruct,
    "om_card_options": CardOptionsStruct,
}
