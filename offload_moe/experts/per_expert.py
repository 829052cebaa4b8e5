"""Arithmetic that takes one expert at a time: the reference.

It performs the operations of transformers' eager experts, in their order. It decodes an expert first, so it takes any
codec on any device, is slow on quantized experts, and is the oracle of the faster ones.
T tokens, K top-k, H hidden, I intermediate, t tokens routed to one expert.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from offload_moe.experts.contract import ExpertsContract, pair_scale_of
from offload_moe.experts.routing import Routing
from offload_moe.quant import Codec, ExpertShape
from offload_moe.residency.lease import Lease


class ReferenceArithmetic:
    """Computes experts as they arrive, and adds them as eager does: by ascending id, in the hidden dtype.

    Decoded, then the same torch operations as eager: for the lossless codec the same operands, so the same bits
    wherever the math library's products depend on their operands alone.
    """

    order = None  # rows

    def __init__(self, module: ExpertsContract, shape: ExpertShape, codec: Codec) -> None:
        self._module = module
        self._shape = shape
        self._codec = codec
        self._pair_scale = pair_scale_of(module)

    def forward(
        self, hidden: Tensor, weights: Tensor, routing: Routing, lease: Lease, record_of: Callable[[int], Tensor]
    ) -> Tensor:
        """hidden ``[T, H]``, weights ``[T, K]`` -> ``[T, H]`` in the hidden dtype."""
        if len(hidden) == 1 and len(routing.places) == len(routing.experts):
            return self._one_token(hidden, weights, routing, lease, record_of)
        tokens = torch.tensor(routing.tokens, device=hidden.device)
        places = torch.tensor(routing.places, device=hidden.device)
        place_of = {expert: index for index, expert in enumerate(routing.experts)}
        outputs: dict[int, Tensor] = {}
        for wave in lease:
            for expert, slot in wave:
                pairs = routing.pairs(place_of[expert])
                output = self.expert(hidden[tokens[pairs]], record_of(slot))
                outputs[expert] = self.weighted(output, weights[tokens[pairs], places[pairs], None], hidden.dtype)
        total = torch.zeros_like(hidden)
        for index, expert in enumerate(routing.experts):
            total.index_add_(0, tokens[routing.pairs(index)], outputs[expert])
        return total

    def _one_token(
        self, hidden: Tensor, weights: Tensor, routing: Routing, lease: Lease, record_of: Callable[[int], Tensor]
    ) -> Tensor:
        """The same sums for a decode step, whose pairs need no gathering and no scattering."""
        place_of = dict(zip(routing.experts, routing.places, strict=True))
        outputs: dict[int, Tensor] = {}
        for wave in lease:
            for expert, slot in wave:
                place = place_of[expert]
                output = self.expert(hidden, record_of(slot))
                outputs[expert] = self.weighted(output, weights[:, place : place + 1], hidden.dtype)
        total = torch.zeros_like(hidden)
        for expert in routing.experts:
            total += outputs[expert]
        return total

    def expert(self, x: Tensor, record: Tensor) -> Tensor:
        """One expert on its tokens, ``[t, H] -> [t, H]``."""
        return self.apply(x, self._codec.decode(self._shape, record, x.dtype))

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The same with the expert's tensors in the module's layout."""
        return self.second_half(self.first_half(x, tensors), tensors)

    def first_half(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Up to the inputs of the last projection, ``[t, H] -> [t, I]``."""
        return self._activate(self._project(x, tensors, self._shape.matrices[0].name))

    def second_half(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """From there on, ``[t, I] -> [t, H]``."""
        return self._finish(self._project(x, tensors, self._shape.matrices[1].name))

    def weighted(self, output: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Outputs ``[t, H]`` times routing weights ``[t, 1]``."""
        output = output * weights
        if self._pair_scale != 1:
            output = output * self._pair_scale
        return output.to(dtype)

    def _activate(self, x: Tensor) -> Tensor:
        """The module's own gate and activation on its first projection, ``[t, 2I] -> [t, I]`` where it has a gate."""
        return self._module._apply_gate(x) if self._module.has_gate else self._module.act_fn(x)

    def _finish(self, x: Tensor) -> Tensor:
        return self._module.post_expert_norm(x) if self._module.has_post_expert_norm else x

    def _project(self, x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        weight = tensors[name]
        x = x @ weight if self._shape.is_transposed else nn.functional.linear(x, weight)
        bias = tensors.get(f"{name}_bias")
        return x if bias is None else x + bias
