"""The device's arithmetic: experts that are ready are computed as one group, in few operations.

T tokens, K top-k, H hidden, I intermediate, P routed pairs, p pairs of one group, t tokens of one expert.

Every operation costs the host tens of microseconds, and the work of a decoded token in each of them is tiny. So the
matrices are multiplied expert by expert, where they lie, and the operations between are done once per group.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from offload_moe.experts.contract import ExpertsContract, pair_scale_of
from offload_moe.experts.routing import Routing
from offload_moe.native import kernels
from offload_moe.native.device import keeps_module_order, linear_of
from offload_moe.quant import Codec, ExpertShape
from offload_moe.residency.lease import Lease, Wave

GROUP_PAIRS = 256  # beyond it one expert keeps the device busy, and a group only costs memory
ROW_ALIGNMENT = 256  # bytes; a library may choose another kernel, and other bits, for a matrix that lies unaligned


class DeviceArithmetic:
    """Multiplies with records where they lie in device memory.

    The result does not depend on which experts arrived together: matrices are multiplied expert by expert, the rest
    works on each number alone, and pairs are added as eager adds them, by ascending expert, in the hidden dtype.
    """

    def __init__(self, module: ExpertsContract, shape: ExpertShape, codec: Codec, *, in_panels: bool = False) -> None:
        """in_panels: records are in the order of the device pass."""
        self.order = kernels.panel_order(codec.name, shape) if in_panels else None
        first, last = (matrix.name for matrix in shape.matrices)
        self._module = module
        self._pair_scale = pair_scale_of(module)
        is_changed = self.order is not None
        self._first, self._last = (linear_of(shape, codec, name, in_panels=is_changed) for name in (first, last))
        self._must_interleave = shape.is_interleaved and not keeps_module_order(codec)

    @torch.no_grad()
    def forward(
        self, hidden: Tensor, weights: Tensor, routing: Routing, lease: Lease, record_of: Callable[[int], Tensor]
    ) -> Tensor:
        """hidden ``[T, H]``, weights ``[T, K]`` -> ``[T, H]`` in the hidden dtype."""
        if not routing.experts:
            return torch.zeros_like(hidden)
        layer = self.begin(hidden, weights, routing, record_of)
        for wave in lease:
            layer.add_wave(wave)
        return layer.value()

    @torch.no_grad()
    def begin(
        self, hidden: Tensor, weights: Tensor, routing: Routing, record_of: Callable[[int], Tensor]
    ) -> "DeviceLayer":
        """A layer with no expert computed yet; `routing` has at least one."""
        weights = weights if self._pair_scale == 1 else weights * self._pair_scale
        return DeviceLayer(self, hidden, weights, routing, record_of)

    def compute(self, group: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Rows ``[t, H]`` and record of each expert -> their outputs ``[p, H]``, one below the other."""
        x = _concatenate([self._first(rows, record) for rows, record in group])
        if self._must_interleave:
            x = torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)
        x = self._module._apply_gate(x) if self._module.has_gate else self._module.act_fn(x)
        parts = x.split([len(rows) for rows, _ in group])
        if x.shape[1] * x.itemsize % ROW_ALIGNMENT:
            parts = tuple(part.clone() for part in parts)
        outputs = [self._last(part, record) for part, (_, record) in zip(parts, group, strict=True)]
        if self._module.has_post_expert_norm:
            outputs = [self._module.post_expert_norm(output) for output in outputs]
        return _concatenate(outputs)


class DeviceLayer:
    """One layer of one forward: experts are added in any order, on the device or computed elsewhere."""

    def __init__(
        self,
        arithmetic: DeviceArithmetic,
        hidden: Tensor,
        weights: Tensor,
        routing: Routing,
        record_of: Callable[[int], Tensor],
    ) -> None:
        self._arithmetic = arithmetic
        self._hidden = hidden
        self._routing = routing
        self._record_of = record_of
        self._pairs = RoutedPairs(hidden, weights, routing)
        self._total = AscendingSum(self._pairs, hidden)
        self._place_of = {expert: index for index, expert in enumerate(routing.experts)}

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @torch.no_grad()
    def add_wave(self, wave: Wave) -> None:
        """Compute these experts from their slots."""
        for group in _groups(wave, self._place_of, self._routing):
            indices = [index for index, _ in group]
            records = [(self._pairs.rows(index), self._record_of(slot)) for index, slot in group]
            self.add_outputs(indices, self._arithmetic.compute(records))

    @torch.no_grad()
    def add_outputs(self, indices: list[int], outputs: Tensor) -> None:
        """outputs ``[p, H]`` of ``routing.experts[index]``, one below the other, before their routing weights."""
        scaled = torch.empty_like(outputs, dtype=self._hidden.dtype)
        torch.mul(outputs, self._pairs.weights(indices), out=scaled)
        offsets = self._routing.offsets
        sizes = [offsets[index + 1] - offsets[index] for index in indices]
        for index, rows in zip(indices, scaled.split(sizes), strict=True):
            self._total.add(index, rows)

    def value(self) -> Tensor:
        """``[T, H]`` in the hidden dtype, once every expert is added."""
        return self._total.value()


class RoutedPairs:
    """Tokens and weights of the routed pairs, sorted by expert, on the device.

    A single token needs no list of tokens, so nothing is sent to the device for it.
    """

    def __init__(self, hidden: Tensor, weights: Tensor, routing: Routing) -> None:
        self._hidden = hidden
        self._routing = routing
        self.tokens: Tensor | None = None
        if len(hidden) == 1 and len(routing.places) == len(routing.experts):
            self._weights = _concatenate([weights[:, place : place + 1] for place in routing.places])
        else:
            indices = torch.tensor([routing.tokens, routing.places]).to(hidden.device, non_blocking=True)
            self.tokens = indices[0]
            self._weights = weights[indices[0], indices[1], None]

    def rows(self, index: int) -> Tensor:
        """The tokens routed to ``experts[index]``, ``[t, H]``."""
        return self._hidden if self.tokens is None else self._hidden[self.tokens[self._routing.pairs(index)]]

    def weights(self, indices: list[int]) -> Tensor:
        """The routing weights of these experts, ``[p, 1]``."""
        if len(indices) == len(self._routing.experts) and indices == sorted(indices):
            return self._weights
        return _concatenate([self._weights[self._routing.pairs(index)] for index in indices])

    def target(self, index: int) -> Tensor | None:
        """Where the outputs of ``experts[index]`` belong, ``[t]``; None for a single token."""
        return None if self.tokens is None else self.tokens[self._routing.pairs(index)]


class AscendingSum:
    """Adds the outputs of experts by ascending id, whatever the order they come in."""

    def __init__(self, pairs: RoutedPairs, hidden: Tensor) -> None:
        self._pairs = pairs
        self._waiting: dict[int, Tensor] = {}
        self._next = 0
        self._total = None if pairs.tokens is None else torch.zeros_like(hidden)

    def add(self, index: int, rows: Tensor) -> None:
        """rows ``[t, H]``: the weighted outputs of ``experts[index]``."""
        self._waiting[index] = rows
        while (rows_of_next := self._waiting.pop(self._next, None)) is not None:
            target = self._pairs.target(self._next)
            if self._total is None:
                self._total = rows_of_next
            elif target is None:
                self._total = self._total + rows_of_next
            else:
                self._total.index_add_(0, target, rows_of_next)
            self._next += 1

    def value(self) -> Tensor:
        """``[T, H]``, once every expert is added."""
        assert self._total is not None
        assert not self._waiting
        return self._total


def _groups(wave: Wave, place_of: dict[int, int], routing: Routing) -> Iterator[Wave]:
    """``(index into routing.experts, slot)`` of a wave, ascending, in groups of few pairs."""
    group: Wave = []
    num_pairs = 0
    for index, slot in sorted((place_of[expert], slot) for expert, slot in wave):
        size = routing.offsets[index + 1] - routing.offsets[index]
        if group and num_pairs + size > GROUP_PAIRS:
            yield group
            group, num_pairs = [], 0
        group.append((index, slot))
        num_pairs += size
    yield group


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
