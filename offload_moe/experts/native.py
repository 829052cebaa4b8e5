"""The native arithmetic: one kernel call for all experts that are ready, on their records in RAM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_moe.experts.activation import Activation
from offload_moe.experts.routing import Routing
from offload_moe.native import kernels
from offload_moe.quant import Codec, ExpertShape
from offload_moe.residency.lease import Lease, Wave


@dataclass(frozen=True, slots=True)
class Step:
    """The memory of a decode step. x, out: ``[1, H]``, in a dtype of the kernel; pairs: fp32 ``[K, H]``, for waves.

    dtype: of the result.
    """

    x: Tensor
    out: Tensor
    pairs: Tensor
    dtype: torch.dtype


_spare_pairs: list[Tensor] = []  # of finished steps of all models; as many as there were steps at the same time


class NativeArithmetic:
    """Experts computed by the native kernels. T tokens, K top-k, H hidden, P routed pairs.

    The kernel adds experts in ascending order, in fp32. When experts arrive in several waves, each pair is computed
    separately and the pairs are added afterwards in that same order: the same bits for any order of arrival.

    order: of the records that it reads; None: rows.
    """

    def __init__(
        self,
        shape: ExpertShape,
        codec: Codec,
        activation: Activation,
        *,
        has_gate: bool,
        pair_scale: float = 1.0,
        is_exact: bool = False,
    ) -> None:
        self.pair_scale = pair_scale
        self.order = None if is_exact else kernels.panel_order(codec.name, shape)
        self.kernel = kernels.ExpertKernel(
            codec.name,
            shape,
            codec.layout(shape),
            activation=activation.name,
            has_gate=has_gate,
            alpha=activation.alpha,
            limit=activation.limit,
            in_panels=self.order is not None,
        )

    def forward(
        self, hidden: Tensor, weights: Tensor, routing: Routing, lease: Lease, record_of: Callable[[int], Tensor]
    ) -> Tensor:
        """hidden ``[T, H]``, weights ``[T, K]`` -> ``[T, H]`` in the hidden dtype."""
        x = _kernel_input(hidden)
        pair_weights = self._pair_weights(self.scaled(weights), routing)
        waves = iter(lease)
        first = next(waves, [])
        if len(first) == len(routing.experts):
            out = torch.empty_like(x)
            records = [record_of(slot) for _, slot in sorted(first)]
            self.kernel.forward(x, records, routing.offsets, routing.tokens, pair_weights, out)
            return out.to(hidden.dtype)
        pairs = torch.empty(len(routing.tokens), x.shape[1], dtype=torch.float32)
        self._compute_wave(first, x, pair_weights, routing, record_of, pairs)
        for wave in waves:
            self._compute_wave(wave, x, pair_weights, routing, record_of, pairs)
        return self._add_pairs(pairs, routing, hidden)

    def scaled(self, weights: Tensor) -> Tensor:
        """Routing weights ``[T, K]`` as the family applies them."""
        return weights if self.pair_scale == 1 else weights * self.pair_scale

    def new_step(self, hidden: Tensor, num_experts: int) -> Step:
        """All the memory that a decode step takes, for hidden ``[1, H]``.

        Allocate it before issuing copies: an allocation releases the GIL, and the copy thread would hold it longer than
        the step can wait. That thread runs beside the kernel instead.
        """
        x = _kernel_input(hidden)
        shape = (num_experts, x.shape[1])
        try:
            pairs = _spare_pairs.pop()
        except IndexError:
            pairs = None
        if pairs is None or pairs.shape != shape:
            pairs = torch.empty(shape, dtype=torch.float32)
        return Step(x, torch.empty_like(x), pairs, hidden.dtype)

    def one_token(self, step: Step, weights: Sequence[float], records: Sequence[Tensor]) -> Tensor:
        """A weight and a record per expert, by ascending id -> ``[1, H]``: the bits of `forward`."""
        addresses = [record.data_ptr() for record in records]
        self.kernel.forward_token(step.x, addresses, weights, step.out)
        return self._end(step)

    def one_token_in_waves(
        self,
        step: Step,
        experts: Sequence[int],
        weights: Sequence[float],
        lease: Lease,
        record_of: Callable[[int], Tensor],
    ) -> Tensor:
        """`one_token` while records still arrive: the same bits. experts: ascending ids."""
        row_of = {expert: row for row, expert in enumerate(experts)}
        for wave in lease:
            rows = [row_of[expert] for expert, _ in wave]
            addresses = [record_of(slot).data_ptr() for _, slot in wave]
            self.kernel.forward_token(step.x, addresses, [weights[row] for row in rows], step.pairs, rows)
        kernels.add_rows(step.pairs, step.out)
        return self._end(step)

    def _end(self, step: Step) -> Tensor:
        _spare_pairs.append(step.pairs)
        return step.out if step.out.dtype is step.dtype else step.out.to(step.dtype)

    def outputs(self, hidden: Tensor, routing: Routing, indices: list[int], records: list[Tensor]) -> Tensor:
        """The outputs of ``routing.experts[index]`` on their tokens, before routing weights: fp32 ``[p, H]``.

        Rows are sorted by expert. hidden: ``[T, H]`` on the CPU. records: of the same experts in the same order.
        """
        offsets, pairs = _pairs_of(routing, indices)
        x = _kernel_input(hidden)
        out = torch.empty(len(pairs), x.shape[1], dtype=torch.float32)
        tokens = [routing.tokens[pair] for pair in pairs]
        self.kernel.forward(*(x, records, offsets, tokens, [1.0] * len(pairs), out), out_ids=range(len(pairs)))
        return out

    def _compute_wave(
        self,
        wave: Wave,
        x: Tensor,
        pair_weights: list[float],
        routing: Routing,
        record_of: Callable[[int], Tensor],
        pairs: Tensor,
    ) -> None:
        """Write the rows of these experts' pairs into `pairs` ``[P, H]``."""
        place_of = {expert: index for index, expert in enumerate(routing.experts)}
        offsets, rows = _pairs_of(routing, [place_of[expert] for expert, _ in wave])
        tokens, chosen = [routing.tokens[row] for row in rows], [pair_weights[row] for row in rows]
        records = [record_of(slot) for _, slot in wave]
        self.kernel.forward(*(x, records, offsets, tokens, chosen, pairs), out_ids=rows)

    @staticmethod
    def _add_pairs(pairs: Tensor, routing: Routing, hidden: Tensor) -> Tensor:
        if len(hidden) == 1:
            out = torch.empty(1, pairs.shape[1], dtype=torch.float32)
            kernels.add_rows(pairs, out)
            return out.to(hidden.dtype)
        total = torch.zeros(hidden.shape, dtype=torch.float32)
        tokens = torch.tensor(routing.tokens)
        for index in range(len(routing.experts)):
            own = routing.pairs(index)
            total.index_add_(0, tokens[own], pairs[own])
        return total.to(hidden.dtype)

    @staticmethod
    def _pair_weights(weights: Tensor, routing: Routing) -> list[float]:
        if len(weights) == 1:
            row = weights[0].tolist()
            return [row[place] for place in routing.places]
        picked = weights.float()[torch.tensor(routing.tokens), torch.tensor(routing.places)]
        return picked.tolist()


def _kernel_input(hidden: Tensor) -> Tensor:
    """Contiguous, in a dtype that the kernel reads."""
    x = hidden if hidden.dtype in (torch.float32, torch.bfloat16) else hidden.float()
    return x if x.is_contiguous() else x.contiguous()


def _pairs_of(routing: Routing, indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """The pairs of ``routing.experts[index]``, expert by expert, and where each expert's begin: offsets, pairs."""
    offsets: list[int] = [0]
    pairs: list[int] = []
    for index in indices:
        pairs += range(routing.offsets[index], routing.offsets[index + 1])
        offsets.append(len(pairs))
    return offsets, pairs
