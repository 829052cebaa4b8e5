"""Which modules of a transformers model hold routed experts, and what one expert is made of."""

from dataclasses import dataclass

from torch import nn

from offload_moe.errors import UnsupportedModelError
from offload_moe.quant.layout import ExpertShape, Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsModule:
    """The experts of one MoE layer; its place in `find_experts` is the layer's ordinal."""

    name: str
    module: nn.Module
    num_experts: int
    shape: ExpertShape

    def parameter_names(self) -> tuple[str, ...]:
        """Full names of the parameters that hold every expert of this layer, ``[num_experts, ...]``."""
        return tuple(f"{self.name}.{parameter}" for parameter in self.shape.module_shapes())


def is_experts_module(module: nn.Module) -> bool:
    """Whether transformers' experts registry decorated this module's class.

    Source: transformers/integrations/moe.py, `use_experts_implementation` sets the attribute on every instance.
    """
    return hasattr(module, "_is_expert_parallel")


def find_experts(model: nn.Module) -> list[ExpertsModule]:
    """Every experts module in execution order; parameters may be on `meta` but must still be there.

    Raises:
        UnsupportedModelError: the model has no routed experts, or has some outside transformers' registry.
    """
    found = [
        ExpertsModule(name=name, module=module, num_experts=_num_experts(module), shape=expert_shape(module))
        for name, module in model.named_modules()
        if is_experts_module(module)
    ]
    if unbound := undecorated_experts(model):
        more = f" and {len(unbound) - 1} more" if len(unbound) > 1 else ""
        raise UnsupportedModelError(
            f"{type(model).__name__}: {unbound[0]} ({_class_name(model, unbound[0])}){more} holds experts outside "
            "transformers' experts registry, so they cannot be offloaded. See `offload-moe models` for what works."
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
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    parameters = dict(module.named_parameters(recurse=False))
    bias_names = tuple(f"{name}_bias" for name in names) if module.has_bias else ()
    if set(parameters) != {*names, *bias_names}:
        raise UnsupportedModelError(
            f"{type(module).__name__} has parameters {sorted(parameters)}, expected {sorted({*names, *bias_names})}: "
            "this version does not know what to do with the others."
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


def undecorated_experts(model: nn.Module) -> list[str]:
    """Names of outermost modules that look like routed experts but are not in transformers' registry.

    Without this check such layers would silently run as they are, never offloaded.
    """
    found: list[str] = []
    bound = [name for name, module in model.named_modules() if is_experts_module(module)]
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in (*bound, *found))
        if name not in bound and not inside_another and _looks_like_experts(name, module):
            found.append(name)
    return found


def _looks_like_experts(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2].lower()
    kind = type(module).__name__.lower()
    if "shared" in last or "shared" in kind or not any(True for _ in module.parameters()):
        return False
    return "expert" in kind or ("experts" in last and isinstance(module, nn.ModuleList | nn.ModuleDict))


def _num_experts(module: nn.Module) -> int:
    return int(next(module.parameters(recurse=False)).shape[0])


def _class_name(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name)).__name__
