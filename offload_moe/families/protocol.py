"""The description of an experts class outside transformers' registry by an adapter.

Shape legend: T tokens, E experts, K top-k, H hidden, I intermediate.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from offload_moe.quant.layout import ExpertShape

Bound = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden ``[T, H]``, expert ids ``[T, K]``, weights ``[T, K]`` -> ``[T, H]``, summed by ascending id.

Ids of E and above are dropped.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A parameter that one expert's tensor, or some of its rows, is read from.

    parameter: path below the module; ``{}`` in it is the expert's number where each expert has a parameter of its own.
    num_rows: of a parameter that has the experts one below the other, how many each owns; 0: its first dimension is E.
    is_transposed: the record keeps it the other way round.
    """

    parameter: str
    num_rows: int = 0
    is_transposed: bool = False

    @property
    def is_apart(self) -> bool:
        return "{}" in self.parameter

    @property
    def is_stacked(self) -> bool:
        return not self.is_apart and not self.num_rows

    def paths(self, num_experts: int) -> list[str]:
        """Paths of every parameter that holds experts."""
        return [self.parameter.format(e) for e in range(num_experts)] if self.is_apart else [self.parameter]


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """The operations between and after an expert's matrices, in the terms of transformers' own contract.

    pair_scale: a factor of every weighted output; decorated classes have none.
    """

    has_gate: bool
    act_fn: Callable[[Tensor], Tensor]
    apply_gate: Callable[[Tensor], Tensor] | None = None
    pair_scale: float = 1.0
    has_post_expert_norm: bool = False

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """``[t, 2I] -> [t, I]``."""
        if self.apply_gate is not None:
            return self.apply_gate(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The routed experts of one module.

    parts: for each tensor of the record, by name, the parameters it is read from, one below the other.
    num_spare: experts that parameters have room for but that have no weights.
    is_block: the module routes too; otherwise its parent does.
    """

    num_experts: int
    shape: ExpertShape
    parts: Mapping[str, tuple[Part, ...]]
    between: Between
    num_spare: int = 0
    is_block: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """How one experts class outside transformers' registry is bound.

    family, class_name: transformers' folder, or another part of the path of its module, and the class. describe: what
    the module holds, parameters may be on `meta`. forward: what replaces the module's forward once its parameters are
    gone; `bound` itself where the arguments are the same, so that layers may take the fast path. left_alone: classes of
    the same family that look like experts and stay dense. special: a remark for users. top_k: experts per token, where
    no config has it.
    """

    family: str
    class_name: str
    describe: Callable[[Any], Description]
    forward: Callable[[Any, Bound], Callable[..., Any]]
    special: str
    left_alone: tuple[str, ...] = ()
    top_k: int | None = None

    def fits(self, module: nn.Module) -> bool:
        return type(module).__name__ == self.class_name and self.is_of_family(module)

    def is_of_family(self, module: nn.Module) -> bool:
        """Whether a part of the path of the module's class is the family."""
        return f".{self.family}." in f".{type(module).__module__}."
