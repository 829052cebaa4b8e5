"""The cost of a checkpoint's layer for multi-token prediction, which guesses tokens."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from offload_moe.checkpoint.mtp import SHARED, brings_mtp, build_mtp
from offload_moe.families.text_model import TextModel
from offload_moe.plan.machine import Machine
from offload_moe.plan.parameters import ModelShape, describe_skeleton, with_dtype
from offload_moe.plan.placement import Placement, Settings
from offload_moe.plan.sizes import dense_memory_bytes, store_bytes
from offload_moe.plan.working import cache_bytes
from offload_moe.store.manifest import MTP

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpCost:
    """What the layer takes beside the model.

    store_bytes: on disk. memory_bytes: of its weights and its cache in RAM, where it guesses. num_experts: those that
    share the slots of the others then.
    """

    store_bytes: int
    memory_bytes: int
    num_experts: int


def describe_mtp(module: TextModel, *, is_fast_path: bool) -> ModelShape:
    """The shape of the module alone, without embedding and head, which are the model's."""
    found = describe_skeleton(module, is_fast_path=is_fast_path)
    own = tuple(replace(weight, name=MTP + weight.name) for weight in found.dense if weight.name not in SHARED)
    return replace(found, dense=own, lookup_elements=0, tied_head=None)


def with_mtp(shape: ModelShape, mtp: ModelShape) -> ModelShape:
    """The shape of a model with the layer behind its others."""
    caches = (*shape.attention.cache_layers, *mtp.attention.cache_layers)
    return replace(
        shape,
        layers=(*shape.layers, *mtp.layers),
        dense=(*shape.dense, *mtp.dense),
        attention=replace(shape.attention, cache_layers=caches),
    )


def mtp_cost(
    config: "PreTrainedConfig", names: Collection[str], machine: Machine, settings: Settings, placement: Placement
) -> MtpCost | None:
    """The cost with a placement of the model; None without such a layer. names: of the tensors; empty if unknown."""
    module = build_mtp(with_dtype(config)) if brings_mtp(config, names) else None
    if module is None:
        return None
    shape = describe_mtp(module, is_fast_path=True)
    codec, stored = placement.dense_codec, settings.stored_dense_codec
    cache = cache_bytes(shape, placement.context, machine.dtype, kept=placement.cache_dtype)
    return MtpCost(
        store_bytes=store_bytes(shape, settings.codec, stored),
        memory_bytes=dense_memory_bytes(shape, codec, machine.dtype, stored=stored) + cache,
        num_experts=shape.num_experts,
    )
