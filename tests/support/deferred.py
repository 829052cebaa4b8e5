"""Compute that happens later: every torch operation of a model is issued to a simulated stream, as on a real device.

Operations return at once with the right shape and NaN in it; what they really compute is written when the stream comes
to them, from what memory holds then. Whoever overwrites a slot too early, or reads a result too early, gets wrong
numbers.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload_moe.experts import routing
from offload_moe.memory.simulated import SimulatedStream

_fetch_top_k = routing.fetch_top_k

READS_VALUES = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "bincount", "masked_select", "allclose")


class DeferredCompute(TorchDispatchMode):
    """num_synchronizations: how often the host had to wait for the stream."""

    def __init__(self, stream: SimulatedStream, delay_s: Callable[[], float] = lambda: 0.0) -> None:
        """delay_s: seconds before each operation."""
        super().__init__()
        self.stream = stream
        self.delay_s = delay_s
        self.num_synchronizations = 0
        self.ends_without_waiting = False
        self.errors: list[BaseException] = []

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if not self.ends_without_waiting:
            self.synchronize()

    def synchronize(self) -> None:
        self.num_synchronizations += 1
        self.stream.synchronize()
        if self.errors:
            raise self.errors[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _needs_values(func, inputs):
            self.synchronize()
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._issue(lambda: func(*args, **kwargs))
            return kwargs.get("out", args[0])
        placeholder = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(placeholder) if isinstance(leaf, Tensor)]
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        if not inputs or any(out.untyped_storage().data_ptr() in storages for out in outputs):
            return placeholder  # made from nothing, or a view: no bytes are read
        for out in outputs:
            out.fill_(float("nan") if out.is_floating_point() else 0)
        self._issue(lambda: _write(outputs, func(*args, **kwargs)))
        return placeholder

    def _issue(self, job: Callable[[], None]) -> None:
        def run() -> None:
            try:
                time.sleep(self.delay_s())
                with torch.inference_mode():
                    job()
            except BaseException as error:
                self.errors.append(error)

        self.stream.issue(run)


def _needs_values(func: Any, inputs: list[Tensor]) -> bool:
    name = func._schema.name.split("::")[1]
    is_masked = name in ("index", "index_put", "index_put_") and any(t.dtype == torch.bool for t in inputs[1:])
    return name in READS_VALUES or is_masked


def _write(outputs: list[Tensor], results: Any) -> None:
    for out, result in zip(outputs, (r for r in tree_leaves(results) if isinstance(r, Tensor)), strict=True):
        out.copy_(result)


def fetch_top_k_after_waiting(top_k_index: Tensor) -> routing.Ids:
    """The one host synchronization of an MoE layer; put in the place of `routing.fetch_top_k`."""
    if (mode := _active_mode()) is not None:
        mode.synchronize()
    return _fetch_top_k(top_k_index)


def _active_mode() -> DeferredCompute | None:
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return next((mode for mode in reversed(modes) if isinstance(mode, DeferredCompute)), None)
