"""Counting what a model would launch on a device."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided")


class DeviceOperations(TorchDispatchMode):
    """counts: by name, every operation that is no view and no mere allocation. Copies between host and device count."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        outputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        is_view = not func._schema.is_mutable and outputs <= inputs
        if name not in ALLOCATIONS and not is_view:
            self.counts[name] += 1
        return result

    @property
    def total(self) -> int:
        return self.counts.total()
