"""Replacement policies: which resident expert is worth least."""

from collections.abc import Callable

from offload_moe.errors import ConfigError
from offload_moe.schedule.policy.lru import LRU
from offload_moe.schedule.policy.protocol import Policy

__all__ = ["DEFAULT_POLICY", "POLICY_NAMES", "Policy", "make_policy"]

_FACTORIES: dict[str, Callable[[int, int, int], Policy]] = {
    LRU.name: lambda num_layers, num_experts, num_slots: LRU(),
}
POLICY_NAMES = tuple(_FACTORIES)
DEFAULT_POLICY = LRU.name


def make_policy(name: str, *, num_layers: int, num_experts: int, num_slots: int) -> Policy:
    """A fresh policy for one pool of `num_slots` slots.

    num_layers: layers of the model, also when the pool serves only one of them (keys stay model-wide).
    num_experts: experts per layer, the stride of the keys.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in _FACTORIES:
        raise ConfigError(f"Unknown policy {name!r}. Choose one of: {', '.join(POLICY_NAMES)}.")
    return _FACTORIES[name](num_layers, num_experts, num_slots)
