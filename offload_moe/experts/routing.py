"""The router's choice, grouped by expert, on the host.

T tokens, K top-k, P = T * K routed pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Routed pairs sorted by expert; within one expert in eager's order: by place in the top-k, then by token.

    experts: distinct ids, ascending. offsets: ``experts[i]`` owns pairs ``offsets[i] : offsets[i + 1]``.
    tokens: the token of each pair. places: its column in the top-k. ahead: ids of later layers' routers, K each.
    """

    experts: list[int]
    offsets: list[int]
    tokens: list[int]
    places: list[int]
    ahead: list[list[int]] = field(default_factory=list)

    def pairs(self, index: int) -> slice:
        return slice(self.offsets[index], self.offsets[index + 1])

    def shares(self, num_tokens: int) -> list[float]:
        """The part of the tokens that chose each expert."""
        return [(end - start) / num_tokens for start, end in pairwise(self.offsets)]


def group_by_expert(top_k_index: Tensor, num_experts: int, ahead: Sequence[Tensor] = ()) -> Routing:
    """Group ``[T, K]`` expert ids. The copy to the host here is the only synchronization of an MoE layer.

    Ids of `num_experts` and above are sentinels of masked tokens and are dropped, as eager drops them.
    ahead: ids ``[1, K]`` of later layers' routers, copied to the host with them.
    """
    num_tokens = len(top_k_index)
    ids = fetch_top_k(torch.cat((top_k_index, *ahead)) if ahead else top_k_index)
    own = ids[:num_tokens]
    routing = _one_token(own[0].tolist(), num_experts) if num_tokens == 1 else _many_tokens(own, num_experts)
    return replace(routing, ahead=ids[num_tokens:].tolist()) if ahead else routing


def fetch_top_k(top_k_index: Tensor) -> Ids:
    """Copy the routed ids to the host, ``[T, K]``. Tests under FakeTensorMode replace this one function."""
    return top_k_index.detach().to("cpu", torch.int64).numpy()


def _one_token(ids: list[int], num_experts: int) -> Routing:
    places = sorted((place for place, expert in enumerate(ids) if expert < num_experts), key=ids.__getitem__)
    experts: list[int] = []
    offsets = []
    for pair, place in enumerate(places):
        if not experts or experts[-1] != ids[place]:
            experts.append(ids[place])
            offsets.append(pair)
    return Routing(experts=experts, offsets=[*offsets, len(places)], tokens=[0] * len(places), places=places)


def _many_tokens(ids: Ids, num_experts: int) -> Routing:
    flat = ids.T.reshape(-1)  # place-major: eager finds its pairs with torch.where on [E, K, T]
    counts = np.bincount(flat, minlength=num_experts)[:num_experts].tolist()
    experts = [expert for expert, count in enumerate(counts) if count]
    offsets = [0]
    for expert in experts:
        offsets.append(offsets[-1] + counts[expert])
    order = np.argsort(flat, kind="stable")[: offsets[-1]]
    tokens, places = order % len(ids), order // len(ids)
    return Routing(experts=experts, offsets=offsets, tokens=tokens.tolist(), places=places.tolist())
