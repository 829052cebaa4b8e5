"""Stores whose layers and linears have codecs of their own: their records in a shape, and what computes them."""

from dataclasses import replace

from offload_moe.card.linears import has_kernel, why_no_experts
from offload_moe.plan.parameters import ModelShape
from offload_moe.quant import is_built_in
from offload_moe.quant.gguf import parse_gguf
from offload_moe.store import Store
from offload_moe.store.in_place import GGUF

NF4_STORE = "`offload-moe quantize MODEL STORE --codec nf4` makes a store that uses a card."


def as_stored(shape: ModelShape, store: Store) -> ModelShape:
    """The shape with the records that a store of several codecs has; a head that shares an embedding has its own."""
    if store.codec != GGUF:
        return shape
    records = {entry.name: entry.place.num_bytes for entry in store.dense.values() if entry.quantized is not None}
    copies = 1 if shape.tied_head is None else 2
    return replace(
        shape,
        layers=tuple(
            replace(layer, record_bytes=stored.record_bytes)
            for layer, stored in zip(shape.layers, store.layers, strict=True)
        ),
        dense=tuple(
            replace(weight, record_bytes=size * (copies if store.dense[weight.name].is_lookup else 1))
            if (size := records.get(weight.name)) is not None
            else weight
            for weight in shape.dense
        ),
    )


def why_on_the_cpu(store: Store) -> str | None:
    """Why a card cannot compute a store's experts; None where it can."""
    if store.codec == GGUF:
        missing = _type_without_kernel(store)
        return f"No card computes {missing}: {NF4_STORE}" if missing else None
    if not is_built_in(store.codec):
        return f"The codec {store.codec} of an extension is computed on the CPU: {NF4_STORE}"
    return None


def _type_without_kernel(store: Store) -> str:
    """Which of a GGUF file's types has no kernel on a card; empty where all have."""
    for layer in store.layers:
        if reason := why_no_experts(layer.codec or "", has_gate=layer.shape.has_gate):
            return reason
    for entry in store.dense.values():
        codec = parse_gguf(entry.codec or "") if entry.quantized is not None else None
        if codec is not None and not has_kernel(codec.kinds[0].name, is_table=entry.is_lookup):
            return f"{entry.name} in {codec.kinds[0].name}"
    return ""
