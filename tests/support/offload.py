"""Attach a model to tiers whose RAM is filled from a dict, with or without a simulated device above it."""

import copy
import random
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload_moe.checkpoint.experts import find_experts
from offload_moe.experts.arithmetic import Arithmetic
from offload_moe.experts.attach import BoundExperts, attach, detach_parameters
from offload_moe.experts.contract import ExpertsContract
from offload_moe.experts.hybrid import Hybrid, HybridBinder
from offload_moe.experts.per_expert import ReferenceArithmetic
from offload_moe.memory.arena import Arena
from offload_moe.memory.copier import Copier
from offload_moe.memory.mover import Arrived
from offload_moe.quant import Codec, ExpertShape, get_codec
from offload_moe.quant.layout import RECORD_ALIGNMENT, round_up
from offload_moe.residency.hierarchy import Hierarchy, Pools
from offload_moe.residency.keys import ExpertKeys


class MemoryMover:
    """Copies records from a dict, from threads, after random delays."""

    def __init__(self, records: dict[int, Tensor], arena: Arena) -> None:
        self.records, self.arena, self.random = records, arena, random.Random(0)

    def start(self, key: int, slot: int, arrived: Arrived, *, is_prefetch: bool = False) -> None:
        threading.Timer(self.random.random() * 0.0005, self._copy, (key, slot, arrived)).start()

    def _copy(self, key: int, slot: int, arrived: Arrived) -> None:
        self.arena.slot(slot).fill_(0xA5)
        self.arena.slot(slot)[: self.records[key].numel()] = self.records[key]
        arrived(slot, self.records[key].numel(), None)

    def cancel(self, slot: int) -> bool:
        return False

    def promote(self, slot: int) -> None:
        pass

    def drain(self) -> None:
        pass

    def used(self, slots: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        pass


def offload(
    model: PreTrainedModel,
    codec_name: str,
    num_slots: int,
    copier: Copier | None = None,
    num_device_slots: int = 0,
    arithmetic: Callable[[ExpertsContract, ExpertShape, Codec], Arithmetic] = ReferenceArithmetic,
    slots_per_chunk: int = 1000,
    hybrid: Hybrid = "off",
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The attached model, with its `hierarchy`, and an eager one whose experts are the dequantized ones."""
    codec = get_codec(codec_name)
    oracle, attached = copy.deepcopy(model), copy.deepcopy(model)
    layers = find_experts(attached)
    keys = ExpertKeys(layer.num_experts for layer in layers)
    records: dict[int, Tensor] = {}
    for ordinal, (layer, oracle_layer) in enumerate(zip(layers, find_experts(oracle), strict=True)):
        for expert in range(layer.num_experts):
            tensors = {name: getattr(layer.module, name).data[expert] for name in layer.shape.module_shapes()}
            record = codec.encode(layer.shape, tensors)
            records[keys.key(ordinal, expert)] = record
            for name, value in codec.decode(layer.shape, record, torch.float32).items():
                getattr(oracle_layer.module, name).data[expert] = value
    pools = Pools(
        keys=keys,
        slot_bytes=max(record.numel() for record in records.values()),
        num_ram_slots=num_slots,
        num_device_slots=num_device_slots,
        chunk_bytes=slots_per_chunk * round_up(max(record.numel() for record in records.values()), RECORD_ALIGNMENT),
    )
    attached.hierarchy = hierarchy = Hierarchy(pools, lambda arena, _: MemoryMover(records, arena), copier)
    detach_parameters(layers)
    bind = HybridBinder(hierarchy, hybrid) if num_device_slots else None
    bound = []
    for ordinal, layer in enumerate(layers):
        made = arithmetic(layer.module, layer.shape, codec)
        bound.append(
            (bind and bind(ordinal, layer, codec, made))
            or BoundExperts(ordinal, layer.num_experts, hierarchy.scheduler, hierarchy.record_of, made)
        )
    attach(layers, bound)
    return attached, oracle
