"""Replacement policies: which resident expert is worth least."""

from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy.extended import Extended, Factory, OnFault, extended_factory
from offload_moe.residency.policy.frequency import LFU, DecayedFrequency
from offload_moe.residency.policy.knn import KNN
from offload_moe.residency.policy.lru import LRU, Unranked
from offload_moe.residency.policy.lru_2 import LRU2
from offload_moe.residency.policy.protocol import Appraising, OfTokens, Policy
from offload_moe.residency.policy.slru import SLRU
from offload_moe.system.extensions import with_extensions
from offload_moe.system.names import no_such

__all__ = [
    "DEFAULT_POLICY",
    "LRU",
    "POLICY_NAMES",
    "Appraising",
    "OfTokens",
    "Policy",
    "check_policy",
    "make_policy",
    "policy_names",
    "policy_of_pool",
]

_FACTORIES: dict[str, Factory] = {
    LRU.name: lambda keys, layers, num_slots: LRU(),
    LFU.name: lambda keys, layers, num_slots: LFU(),
    DecayedFrequency.name: lambda keys, layers, num_slots: DecayedFrequency(),
    SLRU.name: lambda keys, layers, num_slots: SLRU(num_slots),
    LRU2.name: lambda keys, layers, num_slots: LRU2(),
    KNN.name: lambda keys, layers, num_slots: KNN(keys, layers, num_slots),
}
POLICY_NAMES = tuple(_FACTORIES)
DEFAULT_POLICY = KNN.name


def policy_names() -> tuple[str, ...]:
    """Built-in policies, then those of extensions."""
    return with_extensions("policy", POLICY_NAMES)


def check_policy(name: str) -> None:
    """Check that a policy can be made. Raises: ConfigError when it is unknown, or of an extension that is broken."""
    _factory(name)


def make_policy(name: str, keys: ExpertKeys, *, num_slots: int, layers: range | None = None) -> Policy:
    """A fresh policy for one pool of `num_slots` slots. layers: the pool's; None: all.

    Raises:
        ConfigError: the name is unknown, or an extension failed.
    """
    return _factory(name)(keys, range(keys.num_layers) if layers is None else layers, num_slots)


def policy_of_pool(policy: str, keys: ExpertKeys, *, num_slots: int, on_fault: OnFault | None = None) -> Policy:
    """As `make_policy`, for a pool shared by all layers, which needs none where it has a slot for every expert.

    on_fault: see `Extended`.
    """
    made = Unranked() if num_slots >= keys.total else make_policy(policy, keys, num_slots=num_slots)
    if isinstance(made, Extended):
        made.on_fault = on_fault
    return made


def _factory(name: str) -> Factory:
    found = _FACTORIES.get(name) or extended_factory(name)
    if found is None:
        raise no_such("policy", name, policy_names())
    return found
