"""Adapters of extensions, by the name of the experts class."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from offload_moe.families.protocol import Adapter, Bound, Description, Part
from offload_moe.system.extensions import Extension, find_extension
from offload_moe.system.stopping import StoppedInForward


def extended_adapter(name: str) -> Adapter | None:
    """The adapter that an extension registers for a class; None where none does. Raises: ConfigError when broken."""
    extension = find_extension("adapter", name)
    return None if extension is None else _guarded(extension, extension.load())


def _guarded(extension: Extension, adapter: Any) -> Adapter:
    """The adapter, whose errors name the distribution and whose descriptions are compared with the module."""
    if not isinstance(adapter, Adapter):
        raise extension.fault(f"is {type(adapter).__name__}, not an Adapter")
    if adapter.class_name != extension.name:
        raise extension.fault(f"is about {adapter.class_name}, which must be its name")

    def describe(module: Any) -> Description:
        with extension.guard():
            found = adapter.describe(module)
            if reason := _mismatch(found, module):
                raise extension.fault(f"does not describe {type(module).__name__}: {reason}")
        return found

    def forward(module: Any, bound: Bound) -> Callable[..., Any]:
        with extension.guard():
            inner = adapter.forward(module, bound)
        if inner is bound:
            return bound

        def guarded(*args: Any, **kwargs: Any) -> Any:
            with extension.guard(StoppedInForward, torch.OutOfMemoryError):  # of the experts that it calls
                return inner(*args, **kwargs)

        return guarded

    return replace(adapter, describe=describe, forward=forward)


def _mismatch(found: Description, module: nn.Module) -> str:
    """What parameters lack of the experts that are described; empty where nothing is missing."""
    parameters = {name for name, _ in module.named_parameters()}
    for tensor, dims in found.shape.module_shapes().items():
        num_elements = 0
        for part in found.parts.get(tensor, ()):
            for path in part.paths(found.num_experts):
                if path not in parameters:
                    return f"there is no parameter {path}"
            num_elements += _elements_per_expert(part, module, found.num_experts)
        if num_elements != math.prod(dims):
            return f"an expert's {tensor} has {math.prod(dims)} weights, its parts have {num_elements}"
    return ""


def _elements_per_expert(part: Part, module: nn.Module, num_experts: int) -> int:
    shape = module.get_parameter(part.paths(num_experts)[0]).shape
    if part.is_apart:
        return math.prod(shape)
    rows = part.num_rows or 1
    return rows * math.prod(shape[1:]) if shape[0] >= rows * num_experts else 0
