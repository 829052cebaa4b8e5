"""Native CPU kernels: quantized matrices times a few tokens, whole MoE layers in one call."""

from offload_moe.native.attention import AttendKernel, AttentionKernel, HeadNorm, Linear, NormKernel
from offload_moe.native.bindings import (
    instruction_set,
    num_threads,
    select_instruction_set,
    set_threads,
    use_torch_after_fork,
)
from offload_moe.native.checksum import crc32
from offload_moe.native.codecs import fast_encoding
from offload_moe.native.constants import (
    ARRIVING,
    DONE,
    DROPPED,
    FAILED,
    FETCHED,
    HIT,
    MAX_ROWS,
    MAX_TOP_K,
    MISSING,
    NEEDS_EXPERTS,
    NEEDS_SLOTS,
    READING,
    SHORT_READ,
    WRONG_CHECKSUM,
)
from offload_moe.native.delta import DeltaKernel, Projected
from offload_moe.native.embedding import EmbeddingKernel
from offload_moe.native.encode import encode_int8, encode_nf4, search_int8, search_nf4
from offload_moe.native.experts import ExpertKernel, add_rows
from offload_moe.native.latent import LatentKernel
from offload_moe.native.layer import LayerKernel
from offload_moe.native.linear import LinearKernel
from offload_moe.native.linear_attention import LinearAttentionKernel, state_places
from offload_moe.native.mlp import MlpKernel
from offload_moe.native.panels import PanelOrder, Repacking, panel_order
from offload_moe.native.planes import not_in_panels_reason, not_in_rows_reason, shares_inputs, unsupported_reason
from offload_moe.native.reads import Completion, Reads, ReadSizes
from offload_moe.native.rooms import Room, tokens_apart
from offload_moe.native.router import RouterKernel
from offload_moe.native.slot_table import SlotTable
from offload_moe.native.span import (
    SharedKernel,
    SpanKernel,
    SpanLayer,
    SpanRows,
    TokenPass,
)
from offload_moe.native.structs import FileStruct, PieceStruct, PlaceStruct

__all__ = [
    "ARRIVING",
    "DONE",
    "DROPPED",
    "FAILED",
    "FETCHED",
    "HIT",
    "MAX_ROWS",
    "MAX_TOP_K",
    "MISSING",
    "NEEDS_EXPERTS",
    "NEEDS_SLOTS",
    "READING",
    "SHORT_READ",
    "WRONG_CHECKSUM",
    "AttendKernel",
    "AttentionKernel",
    "Completion",
    "DeltaKernel",
    "EmbeddingKernel",
    "ExpertKernel",
    "FileStruct",
    "HeadNorm",
    "LatentKernel",
    "LayerKernel",
    "Linear",
    "LinearAttentionKernel",
    "LinearKernel",
    "MlpKernel",
    "NormKernel",
    "PanelOrder",
    "PieceStruct",
    "PlaceStruct",
    "Projected",
    "ReadSizes",
    "Reads",
    "Repacking",
    "Room",
    "RouterKernel",
    "SharedKernel",
    "SlotTable",
    "SpanKernel",
    "SpanLayer",
    "SpanRows",
    "TokenPass",
    "add_rows",
    "crc32",
    "encode_int8",
    "encode_nf4",
    "fast_encoding",
    "instruction_set",
    "not_in_panels_reason",
    "not_in_rows_reason",
    "num_threads",
    "panel_order",
    "search_int8",
    "search_nf4",
    "select_instruction_set",
    "set_threads",
    "shares_inputs",
    "state_places",
    "tokens_apart",
    "unsupported_reason",
    "use_torch_after_fork",
]
