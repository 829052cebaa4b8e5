"""Policies of extensions, held to what the residency relies on."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy.protocol import Appraising, Policy
from offload_moe.system.extensions import Extension, find_extension

Factory = Callable[[ExpertKeys, range, int], Policy]
"""Keys of the model, layers and number of slots of the pool -> a fresh policy."""

OnFault = Callable[[Exception], object]
Result = TypeVar("Result")
METHODS = ("access", "insert", "remove", "resize", "victim")


def extended_factory(name: str) -> Factory | None:
    """What makes the policy of an extension; None where there is none. Raises: ConfigError when it is broken."""
    extension = find_extension("policy", name)
    if extension is None:
        return None
    factory = extension.load()
    if not callable(factory):
        raise extension.fault(f"is {type(factory).__name__}, which cannot be called with keys, layers and slots")

    def make(keys: ExpertKeys, layers: range, num_slots: int) -> Policy:
        with extension.guard():
            policy = factory(keys, layers, num_slots)
            missing = [method for method in METHODS if not callable(getattr(policy, method, None))]
            kind = ExtendedAppraising if isinstance(policy, Appraising) else Extended
        if missing:
            raise extension.fault(f"has no method {missing[0]}")
        return kind(policy, extension, keys.total)

    return make


class Extended:
    """The policy of an extension, which may fail: its errors name the distribution.

    on_fault: gets the first error, which is raised where this is None. A raised error would leave the residency between
    two states, so from then on the extension is not called any more, and the oldest resident expert is evicted.
    """

    def __init__(self, policy: Policy, extension: Extension, num_keys: int) -> None:
        self.name = extension.name
        self.on_fault: OnFault | None = None
        self._policy = policy
        self._extension = extension
        self._num_keys = num_keys
        self._has_failed = False
        self._resident: dict[int, None] = {}  # oldest first

    def access(
        self, layer: int, keys: Sequence[int], weights: Sequence[float] | None = None, num_tokens: int = 1
    ) -> None:
        self._call(lambda: self._policy.access(layer, keys, weights, num_tokens))

    def insert(self, key: int) -> None:
        self._resident[key] = None
        self._call(lambda: self._policy.insert(key))

    def remove(self, key: int) -> None:
        del self._resident[key]
        self._call(lambda: self._policy.remove(key))

    def resize(self, num_slots: int) -> None:
        self._call(lambda: self._policy.resize(num_slots))

    def victim(self, leased: Callable[[int], bool]) -> int | None:
        is_leased: dict[int, bool] = {}  # token passes lease without the lock, so each key is examined once

        def examine(key: int) -> bool:
            if key not in is_leased:
                is_leased[key] = leased(key)
            return is_leased[key]

        oldest = next((key for key in self._resident if not examine(key)), None)
        return self._call(lambda: self._checked(self._policy.victim(examine), examine, oldest), otherwise=oldest)

    def _checked(self, key: int | None, is_leased: Callable[[int], bool], oldest: int | None) -> int | None:
        if key is None and oldest is not None:  # the caller would wait for a lease to end
            raise self._extension.fault("evicts none, although an expert is not leased")
        if key is not None and key not in self._resident:
            raise self._extension.fault(f"evicts {key!r}, which is not resident")
        if key is not None and is_leased(key):
            raise self._extension.fault(f"evicts {key!r}, which is leased")
        return key

    def _call(self, work: Callable[[], Result | None], otherwise: Result | None = None) -> Result | None:
        if self._has_failed:
            return otherwise
        try:
            with self._extension.guard():
                return work()
        except Exception as error:
            self._has_failed = True
            if self.on_fault is None:
                raise
            self.on_fault(error)
            return otherwise


class ExtendedAppraising(Extended):
    """One that has a number for every expert."""

    @property
    def worths(self) -> NDArray[np.float32]:
        """See `Appraising`."""
        none = np.zeros(self._num_keys, dtype=np.float32)
        found = self._call(self._checked_worths, otherwise=none)
        return none if found is None else found

    def _checked_worths(self) -> NDArray[np.float32]:
        assert isinstance(self._policy, Appraising)
        worths = np.asarray(self._policy.worths, dtype=np.float32)
        if worths.shape != (self._num_keys,):
            raise self._extension.fault(f"gives worths of shape {worths.shape} for {self._num_keys} experts")
        return worths
