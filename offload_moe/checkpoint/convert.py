"""Run transformers' own weight conversions on a piece of a layer: one expert, or one dense parameter.

The operations on experts work on each expert separately, so a module list of length one, or one slice of a fused
tensor, gives the same bits as the whole layer. `check_per_expert` refuses operations without that property.
"""

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from offload_moe.checkpoint.names import SourceGroup
from offload_moe.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import ConversionOps


class OneExpertModel:
    """The model for a conversion's shape look-ups: experts parameters have one expert, ``[1, ...]``."""

    def __init__(self, model: "PreTrainedModel", experts_parameters: set[str]) -> None:
        self._model = model
        self._experts_parameters = experts_parameters
        self.config = model.config

    def get_parameter(self, name: str) -> Tensor:
        parameter = self._model.get_parameter(name)
        return parameter[:1] if name in self._experts_parameters else parameter


def convert(
    group: SourceGroup, tensors: Mapping[str, list[Tensor]], model: "OneExpertModel | PreTrainedModel"
) -> dict[str, Tensor]:
    """Convert a group's tensors to parameters. `tensors` holds the tensors of each source pattern.

    Raises:
        CheckpointError: the tensors do not fit together.
    """
    if group.converter is None:
        return {group.target: next(iter(tensors.values()))[0]}
    converter: Any = copy.deepcopy(group.converter)  # a converter keeps the tensors it is given
    for pattern, values in tensors.items():
        for value in values:
            converter.add_tensor(group.target, group.target, pattern, value)
    try:
        converted = converter.convert(group.target, model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"Tensor {group.names[0]} (and {len(group.names) - 1} more) does not convert to {group.target}: {error}"
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def is_module_list(group: SourceGroup) -> bool:
    """Whether the checkpoint has one tensor per expert, rather than one for all."""
    from transformers.core_model_loading import MergeModulelist

    return any(isinstance(op, MergeModulelist) or op.supports_many_to_many for op in _operations(group))


def possible_targets(group: SourceGroup) -> list[str]:
    """Every parameter that a group may be converted to: Ernie's text and vision experts share one module list."""
    if group.converter is None:
        return [group.target]
    first = group.converter.target_patterns[0]
    return [group.target.replace(first, pattern) for pattern in group.converter.target_patterns]


def check_per_expert(group: SourceGroup) -> None:
    """Check that operations do not mix experts. Raises: UnsupportedModelError."""
    for position, op in enumerate(_operations(group)):
        if not _acts_per_expert(op, position):
            raise UnsupportedModelError(
                f"{group.target} is converted by {op!r}, which is not known to work expert by expert."
            )


def check_module_list(group: SourceGroup, num_experts: int, num_spare: int = 0) -> None:
    """Check that a module list has every expert once.

    num_spare: further experts that may exist and are ignored.

    Raises: CheckpointError naming the first expert tensor that is missing or too many.
    """
    expected = set(range(num_experts))
    for pattern in group.converter.source_patterns if group.converter is not None else ():
        names = group.sources.get(pattern)
        if not names:
            raise CheckpointError(f"No tensor matches {pattern} for {group.target}.")
        numbers = {int(match[1]): name for name in names if (match := re.search(r"experts\.(\d+)\.", name))}
        for number in sorted(expected - set(numbers)):
            missing = re.sub(r"experts\.\d+\.", f"experts.{number}.", names[0])
            raise CheckpointError(f"Tensor {missing} is missing: expert {number} of {num_experts} for {group.target}.")
        extra = next((name for number, name in numbers.items() if number >= num_experts + num_spare), None)
        if extra is not None:
            raise CheckpointError(f"Tensor {extra} is one too many: {group.target} has {num_experts} experts.")


def _acts_per_expert(op: "ConversionOps", position: int) -> bool:
    from transformers import core_model_loading as ops

    match op:
        case ops.MergeModulelist():
            return bool(op.dim == 0 and position == 0)
        case ops.ErnieFuseAndSplitTextVisionExperts():
            return bool(op.stack_dim == 0 and op.concat_dim > 0)
        case ops.Concatenate() | ops.Chunk() | ops.Interleave():
            return bool(op.dim > 0)
        case ops.Transpose():
            return bool(op.dim0 > 0 and op.dim1 > 0)
    return False


def _operations(group: SourceGroup) -> "list[ConversionOps]":
    return group.converter.operations if group.converter is not None else []
