"""Replacement policies: which resident expert is worth least."""

from collections.abc import Callable

from offload_moe.residency.policy.frequency import LFU, DecayedFrequency
from offload_moe.residency.policy.knn import KNN
from offload_moe.residency.policy.lru import LRU
from offload_moe.residency.policy.lru_2 import LRU2
from offload_moe.residency.policy.protocol import Policy
from offload_moe.residency.policy.slru import SLRU
from offload_moe.system.names import choice

__all__ = ["DEFAULT_POLICY", "LRU", "POLICY_NAMES", "Policy", "check_policy", "make_policy"]

_FACTORIES: dict[str, Callable[[range, int, int], Policy]] = {
    LRU.name: lambda layers, num_experts, num_slots: LRU(),
    LFU.name: lambda layers, num_experts, num_slots: LFU(),
    DecayedFrequency.name: lambda layers, num_experts, num_slots: DecayedFrequency(),
    SLRU.name: lambda layers, num_experts, num_slots: SLRU(num_slots),
    LRU2.name: lambda layers, num_experts, num_slots: LRU2(),
    KNN.name: lambda layers, num_experts, num_slots: KNN(layers, num_experts, num_slots),
}
POLICY_NAMES = tuple(_FACTORIES)
DEFAULT_POLICY = KNN.name


def check_policy(name: str) -> None:
    """Raises: ConfigError when the name is unknown."""
    choice("policy", name, POLICY_NAMES)


def make_policy(name: str, *, num_layers: int, num_experts: int, num_slots: int, first_layer: int = 0) -> Policy:
    """A fresh policy for one pool of `num_slots` slots that serves `num_layers` layers from `first_layer` on.

    num_experts: experts per layer, the stride of the keys (`layer * num_experts + expert`, also in a one-layer pool).

    Raises:
        ConfigError: the name is unknown.
    """
    check_policy(name)
    return _FACTORIES[name](range(first_layer, first_layer + num_layers), num_experts, num_slots)
