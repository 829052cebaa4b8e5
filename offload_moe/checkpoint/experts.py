"""The modules of a transformers model that hold routed experts, and the matrices of one expert."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from offload_moe.checkpoint.overlooked import overlooked_experts
from offload_moe.errors import UnsupportedModelError
from offload_moe.families import ADAPTERS, Adapter, Part, find_adapter
from offload_moe.quant.layout import GATED, ExpertShape, Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsModule:
    """The experts of one MoE layer; its place in `find_experts` is the layer's ordinal.

    contract: the operations between an expert's matrices in the terms of transformers' registry; the module itself if
    its class is decorated. parts: the source parameters of each tensor of a record. num_spare: experts in the
    parameters' shapes that have no weights. block_name: the module that contains the router. adapter: None for a
    decorated class.
    """

    name: str
    module: nn.Module
    num_experts: int
    shape: ExpertShape
    contract: Any
    parts: Mapping[str, tuple[Part, ...]]
    block_name: str
    num_spare: int = 0
    adapter: Adapter | None = None

    def parameter_names(self) -> tuple[str, ...]:
        """Full names of the parameters that hold the experts of this layer."""
        parts = [part for tensor in self.shape.module_shapes() for part in self.parts[tensor]]
        return tuple(f"{self.name}.{path}" for part in parts for path in part.paths(self.num_experts))

    @property
    def is_stacked(self) -> bool:
        """Whether every tensor is one parameter ``[num_experts, ...]``."""
        return all(len(parts) == 1 and parts[0].is_stacked for parts in self.parts.values())

    def stacked_name(self, tensor: str) -> str:
        """Full name of the parameter ``[num_experts, ...]`` of a tensor. Only if `is_stacked`."""
        return f"{self.name}.{self.parts[tensor][0].parameter}"


def is_experts_module(module: nn.Module) -> bool:
    """Whether transformers' experts registry decorated this module's class.

    Source: transformers/integrations/moe.py, `use_experts_implementation` sets the attribute on every instance.
    """
    return hasattr(module, "_is_expert_parallel")


def find_experts(model: nn.Module) -> list[ExpertsModule]:
    """Every experts module in execution order; its parameters must exist and may be on `meta`.

    Raises:
    UnsupportedModelError: the model has no routed experts, or some that cannot be bound.
    """
    found = []
    for name, module in model.named_modules():
        if is_experts_module(module):
            found.append(_decorated(name, module))
        elif (adapter := find_adapter(module)) is not None:
            found.append(_adapted(name, module, adapter))
    adapters = [*ADAPTERS, *(layer.adapter for layer in found if layer.adapter is not None)]
    if unbound := overlooked_experts(model, [layer.name for layer in found], adapters):
        more = f" and {len(unbound) - 1} more" if len(unbound) > 1 else ""
        kind = type(model.get_submodule(unbound[0])).__name__
        raise UnsupportedModelError(
            f"{type(model).__name__}: {unbound[0]} ({kind}){more} holds experts outside transformers' experts registry "
            "and has no adapter, so it cannot be offloaded. `offload-moe models` lists the supported families."
        )
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for layer in found:
        if layer.parameter_names()[0] in tied:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {layer.name} shares its experts with another layer "
                f"({tied[layer.parameter_names()[0]]}), as models that write by diffusion do. Only models that write "
                "one token after another are supported."
            )
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} is a dense model: it has no routed experts to offload. Run it with transformers."
        )
    return found


def expert_shape(module: nn.Module) -> ExpertShape:
    """The matrices and biases of one expert of a decorated module, in the order they are used.

    Raises:
        UnsupportedModelError: the module has per-expert parameters beyond two matrices and their biases.
    """
    names = (GATED if module.has_gate else "up_proj", "down_proj")
    parameters = dict(module.named_parameters(recurse=False))
    bias_names = tuple(f"{name}_bias" for name in names) if module.has_bias else ()
    if set(parameters) != {*names, *bias_names}:
        raise UnsupportedModelError(
            f"{type(module).__name__} has parameters {sorted(parameters)}, expected {sorted({*names, *bias_names})}: "
            "this version does not support the others."
        )
    matrices = []
    for name in names:
        rows, columns = parameters[name].shape[1:]
        out_features, in_features = (columns, rows) if module.is_transposed else (rows, columns)
        matrices.append(Matrix(name=name, out_features=out_features, in_features=in_features))
    return ExpertShape(
        matrices=tuple(matrices),
        biases=tuple((name, parameters[name].shape[1]) for name in bias_names),
        is_transposed=bool(module.is_transposed),
        is_interleaved=bool(module.has_gate and not module.is_concatenated),
    )


def _decorated(name: str, module: nn.Module) -> ExpertsModule:
    shape = expert_shape(module)
    return ExpertsModule(
        name=name,
        module=module,
        num_experts=int(next(module.parameters(recurse=False)).shape[0]),
        shape=shape,
        contract=module,
        parts={tensor: (Part(parameter=tensor),) for tensor in shape.module_shapes()},
        block_name=name.rpartition(".")[0],
    )


def _adapted(name: str, module: nn.Module, adapter: Adapter) -> ExpertsModule:
    found = adapter.describe(module)
    return ExpertsModule(
        name=name,
        module=module,
        num_experts=found.num_experts,
        shape=found.shape,
        contract=found.between,
        parts=found.parts,
        block_name=name if found.is_block else name.rpartition(".")[0],
        num_spare=found.num_spare,
        adapter=adapter,
    )
