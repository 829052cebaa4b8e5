"""What the router decided, grouped by expert, on the host.

T tokens, K top-k, P = T * K routed pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Routed pairs sorted by expert; within one expert in eager's order: by place in the top-k, then by token.

    experts: distinct ids, ascending. offsets: ``experts[i]`` owns pairs ``offsets[i] : offsets[i + 1]``.
    tokens: int64 ``[P]``, the token of each pair. places: int64 ``[P]``, its column in the top-k.
    """

    experts: list[int]
    offsets: list[int]
    tokens: Tensor
    places: Tensor

    def pairs(self, index: int) -> slice:
        return slice(self.offsets[index], self.offsets[index + 1])


def group_by_expert(top_k_index: Tensor, num_experts: int) -> Routing:
    """Group ``[T, K]`` expert ids. The copy to the host here is the only synchronization of an MoE layer.

    Ids of `num_experts` and above are sentinels of masked tokens and are dropped, as eager drops them.
    """
    ids = fetch_top_k(top_k_index)
    num_tokens = ids.shape[0]
    flat = ids.T.reshape(-1)  # place-major: eager finds its pairs with torch.where on [E, K, T]
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)[:num_experts].tolist()
    experts = [expert for expert, count in enumerate(counts) if count]
    offsets = [0]
    for expert in experts:
        offsets.append(offsets[-1] + counts[expert])
    order = order[: offsets[-1]]
    return Routing(experts=experts, offsets=offsets, tokens=order % num_tokens, places=order // num_tokens)


def fetch_top_k(top_k_index: Tensor) -> Tensor:
    """Bring the routed ids to the host. Tests under FakeTensorMode replace this one function."""
    return top_k_index.detach().to("cpu", torch.int64)
