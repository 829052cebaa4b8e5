"""From a loaded model to its device pass, or the reason why there is none."""

from collections.abc import Sequence

import torch

from offload_moe.card.block import Experts
from offload_moe.card.device import CardDevice
from offload_moe.card.forward import CardForward, CardPlan
from offload_moe.card.linears import why_no_experts
from offload_moe.card.memory import allocator
from offload_moe.card.model import DecoderLayer, DecoderParts, decoder_parts
from offload_moe.card.passes import CardPass
from offload_moe.card.rooms import Rooms
from offload_moe.card.tables import CardTables
from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.errors import DevicePassUnavailable
from offload_moe.experts.arithmetic import native_arithmetic
from offload_moe.experts.native import NativeArithmetic
from offload_moe.families.text_model import TextModel
from offload_moe.quant import Codec
from offload_moe.quant.layout import round_up
from offload_moe.residency.hierarchy import Hierarchy

FETCH_BYTES = 16  # that a thread copies


def install(
    hf: TextModel,
    layers: Sequence[ExpertsModule],
    hierarchy: Hierarchy,
    codecs: Sequence[Codec],
    device: CardDevice,
    *,
    context: int,
) -> CardPass:
    """Let a model's decode steps take the device pass. codecs: of each layer with experts. context: tokens that memory
    was planned for.

    Raises: DevicePassUnavailable with the reason, BudgetError, TransferError.
    """
    with torch.inference_mode(False):
        parts = decoder_parts(hf)
        allocate = allocator(hf.device)
        experts = list(_experts(parts, layers, hierarchy, codecs))
        rooms = Rooms(parts, allocate, context, hf.device)
        tables = CardTables(parts, hierarchy, device.session, allocate, experts)
        card = CardPass(
            parts,
            hierarchy,
            device.session,
            device.compiler.image,
            allocate,
            tables,
            rooms,
            device.num_processors,
        )
    hierarchy.scheduler.lender = hierarchy.ram.lender = card.end_loans
    hierarchy.before_release.append(card.close)
    hierarchy.before_counters = card.settle
    decoder = hf.get_decoder()
    head = None if parts.head is None else hf.get_output_embeddings()
    decoder.forward = CardForward(decoder, CardPlan(parts, card), hf, head)
    return card


def _experts(
    parts: DecoderParts, layers: Sequence[ExpertsModule], hierarchy: Hierarchy, codecs: Sequence[Codec]
) -> list[Experts | None]:
    """Of each layer of the decoder."""
    return [_experts_of(index, layer, layers, hierarchy, codecs) for index, layer in enumerate(parts.layers)]


def _experts_of(
    index: int, layer: DecoderLayer, layers: Sequence[ExpertsModule], hierarchy: Hierarchy, codecs: Sequence[Codec]
) -> Experts | None:
    bound = layer.bound
    if bound is None:
        return None
    module, codec = layers[bound.layer], codecs[bound.layer]
    if reason := why_no_experts(codec.name, has_gate=module.shape.has_gate):
        raise DevicePassUnavailable(f"no kernel there for {reason}")
    arithmetic = bound.arithmetic
    if not isinstance(arithmetic, NativeArithmetic):
        found = native_arithmetic(module.contract, module.shape, codec, is_exact=False)
        if found is None:
            raise DevicePassUnavailable("experts whose activation or shape has no kernel there")
        arithmetic = found
    if arithmetic.order is None:
        raise DevicePassUnavailable(f"experts in the codec {codec.name} have no kernel there")
    return Experts(
        arithmetic=arithmetic,
        num_experts=module.num_experts,
        first_key=hierarchy.pools.keys.first(bound.layer),
        record_bytes=round_up(codec.layout(module.shape).num_bytes, FETCH_BYTES),
        layer=index,
        log=0,
    )
