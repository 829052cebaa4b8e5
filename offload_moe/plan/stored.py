"""The shape of a model with the records of a store whose layers and linears have codecs of their own."""

from dataclasses import replace

from offload_moe.plan.parameters import ModelShape
from offload_moe.store import Store
from offload_moe.store.in_place import GGUF


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
