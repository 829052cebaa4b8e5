"""Misses on two sides at once: some are copied to the device, the others computed on the CPU where they lie in RAM.

Only for a few tokens, where an expert costs the CPU one pass over its record. The CPU computes with full precision and
results are added as always, by ascending expert, so they differ from the device's by rounding alone.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.errors import ConfigError
from offload_moe.experts.arithmetic import Arithmetic, native_arithmetic
from offload_moe.experts.attach import BoundExperts
from offload_moe.experts.device import DeviceArithmetic, DeviceLayer
from offload_moe.experts.lookahead import Lookahead
from offload_moe.experts.native import NativeArithmetic
from offload_moe.experts.routing import Routing, group_by_expert
from offload_moe.native import kernels
from offload_moe.quant import Codec
from offload_moe.residency.hierarchy import Hierarchy
from offload_moe.residency.split import Balance, Split

Hybrid = Literal["off", "auto", "on"]
HYBRID_CHOICES: tuple[Hybrid, ...] = ("off", "auto", "on")
MAX_TOKENS = 4  # beyond it the device's arithmetic is faster than the CPU's, whatever the link costs


class HybridExperts(BoundExperts):
    """The routed experts of one MoE layer, on a device that shares its misses with the CPU."""

    def __init__(
        self,
        layer: int,
        num_experts: int,
        hierarchy: Hierarchy,
        arithmetic: DeviceArithmetic,
        cpu: NativeArithmetic,
        balance: Balance,
        lookahead: Lookahead | None = None,
    ) -> None:
        super().__init__(layer, num_experts, hierarchy.scheduler, hierarchy.record_of, arithmetic, lookahead)
        self._hierarchy = hierarchy
        self._device = arithmetic
        self._cpu = cpu
        self._balance = balance

    def _compute(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if len(hidden) > MAX_TOKENS:
            return super()._compute(hidden, top_k_index, top_k_weights)
        self._settle()
        on_host = hidden.to("cpu", non_blocking=True)  # issued before the ids: the wait for them covers both
        routing = group_by_expert(top_k_index, self._num_experts, self._route_ahead(hidden, top_k_index))
        if not routing.experts:
            return torch.zeros_like(hidden)
        began = time.perf_counter()
        with self.scheduler.changed:
            split = self._split(routing.experts)
            on_device = [expert for expert in routing.experts if expert not in split.on_cpu]
            num_hits = sum(self.scheduler.is_resident(self.layer, expert) for expert in on_device)
            lease = self.scheduler.acquire(self.layer, on_device, on_cpu=split.on_cpu)
        with lease:
            self._look_ahead(hidden, routing.experts, top_k_index, routing.ahead)
            layer = self._device.begin(hidden, top_k_weights, routing, self._record_of)
            waves = iter(lease)
            if num_hits:
                layer.add_wave(next(waves))
            if split.on_cpu:
                self._compute_on_cpu(layer, on_host, routing, split, began)
            for wave in waves:
                layer.add_wave(wave)
        if split.on_cpu:
            self._balance.unfinished = partial(self._finish, split, began, routing.experts)
        return layer.value()

    def _settle(self) -> None:
        super()._settle()
        self._balance.finish()

    def _split(self, experts: Sequence[int]) -> Split:
        """Divide the experts that are not resident between CPU and device (the device tier's lock is held)."""
        device, ram, layer = self.scheduler, self._hierarchy.ram, self.layer
        missing = [expert for expert in experts if not device.is_resident(layer, expert)]
        if not missing:
            return Split()
        arriving = [expert for expert in missing if device.is_known(layer, expert)]
        absent = [expert for expert in missing if expert not in arriving]
        with ram.changed:
            unread = [expert for expert in absent if not ram.is_resident(layer, expert)]
        in_ram = [expert for expert in absent if expert not in unread]
        return self._balance.split(in_ram, arriving, unread, self._hierarchy.link.busy_s())

    def _compute_on_cpu(self, layer: DeviceLayer, hidden: Tensor, routing: Routing, split: Split, began: float) -> None:
        """In this thread: the loaders copy meanwhile, and the device computes what was resident."""
        place_of = {expert: index for index, expert in enumerate(routing.experts)}
        with self._hierarchy.ram.acquire(self.layer, split.on_cpu) as lease:
            for wave in lease:
                started = time.perf_counter()
                indices = [place_of[expert] for expert, _ in wave]
                records = [self._hierarchy.arena.slot(slot) for _, slot in wave]
                outputs = self._cpu.outputs(hidden, routing, indices, records)
                self._balance.cpu.note((time.perf_counter() - started) / len(wave))
                layer.add_outputs(indices, outputs.to(layer.device, non_blocking=True))
        counters = self.scheduler.counters
        counters.cpu_s += time.perf_counter() - began
        counters.cpu_predicted_s += split.cpu_s

    def _finish(self, split: Split, began: float, experts: Sequence[int]) -> None:
        """Count the seconds of the copies, and copy one of the experts that the CPU computed, as a miss without it.

        One at a time, and only on an idle link: the next layer's misses do not wait for it.
        """
        scheduler, keys = self.scheduler, self.scheduler.keys
        if split.copied:
            scheduler.counters.link_s += max(0.0, self._hierarchy.link.last_demanded_arrival - began)
            scheduler.counters.link_predicted_s += split.link_s
        with scheduler.changed:
            if self._hierarchy.link.busy_s() == 0.0:
                absent = (expert for expert in split.on_cpu if not scheduler.is_known(self.layer, expert))
                if (expert := next(absent, None)) is not None:
                    key = keys.key(self.layer, expert)
                    scheduler.start(key, keys.keys(self.layer, experts), is_prefetch=True)


class HybridBinder:
    """Makes the bound experts of each layer; one balance serves all of them."""

    def __init__(self, hierarchy: Hierarchy, hybrid: Hybrid, lookahead: Lookahead | None = None) -> None:
        self._hierarchy = hierarchy
        self._hybrid = hybrid
        self.lookahead = lookahead
        self._balance = Balance(hierarchy.link.cost)

    def __call__(
        self, ordinal: int, layer: ExpertsModule, codec: Codec, arithmetic: Arithmetic
    ) -> HybridExperts | None:
        """None where hybrid is off or no kernel fits. Raises: ConfigError when hybrid is "on" and no kernel fits."""
        # Lossless records give the same bits wherever an expert is computed, which two arithmetics do not.
        if self._hybrid == "off" or (self._hybrid == "auto" and codec.name == "bf16"):
            return None
        is_in_rows = arithmetic.order is None  # then the CPU keeps activations in full precision
        cpu = native_arithmetic(layer.contract, layer.shape, codec, is_exact=is_in_rows)
        if cpu is not None and isinstance(arithmetic, DeviceArithmetic):
            return HybridExperts(
                ordinal, layer.num_experts, self._hierarchy, arithmetic, cpu, self._balance, self.lookahead
            )
        if self._hybrid == "on":
            reason = kernels.unsupported_reason(codec.name, layer.shape) or "no native kernel fits"
            raise ConfigError(f"Layer {layer.name} cannot be computed on the CPU: {reason}. Use --hybrid auto or off.")
        return None
