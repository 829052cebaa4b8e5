"""Reading a checkpoint one expert at a time, from separate or fused tensors."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offload_moe.checkpoint.convert import (
    OneExpertModel,
    check_module_list,
    check_per_expert,
    convert,
    is_module_list,
    possible_targets,
)
from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.checkpoint.mxfp4 import BLOCKS, SCALES, Mxfp4Tensors
from offload_moe.checkpoint.names import SourceGroup
from offload_moe.checkpoint.tensors import TensorSource
from offload_moe.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ExpertReader:
    """Reads the experts of one MoE layer; everything is checked against the headers before the first read."""

    def __init__(
        self, layer: ExpertsModule, groups: list[SourceGroup], model: "PreTrainedModel", tensors: TensorSource
    ) -> None:
        self._layer = layer
        self._tensors = tensors
        self._model = OneExpertModel(model, set(layer.parameter_names()))
        self._groups = [self._mine(group) for group in groups]
        for group in self._groups:
            self._check_sources(group)
        self._check_result()

    def read(self, expert: int) -> dict[str, Tensor]:
        """The tensors of one expert, keyed by the module's parameter names, each without the expert dimension."""
        converted: dict[str, Tensor] = {}
        for group in self._groups:
            one = {
                pattern: [self._tensors.read(names[expert])] * len(possible_targets(group))
                if is_module_list(group)
                else [self._tensors.read_rows(names[0], expert, expert + 1)]
                for pattern, names in group.sources.items()
            }
            converted |= convert(group, one, self._model)
        return {name: converted[self._layer.stacked_name(name)][0] for name in self._layer.shape.module_shapes()}

    def names(self, expert: int) -> list[str]:
        """The checkpoint's tensors that hold this expert."""
        return [
            names[expert if is_module_list(group) else 0] for group in self._groups for names in group.sources.values()
        ]

    @property
    def is_packed(self) -> bool:
        """Whether the checkpoint has every matrix of these experts in MXFP4."""
        names = {self._layer.stacked_name(matrix.name) for matrix in self._layer.shape.matrices}
        found = [group for group in self._groups if group.target in names]
        return (
            isinstance(self._tensors, Mxfp4Tensors)
            and len(found) == len(names)
            and all(group.converter is None and group.names[0] in self._tensors.recipes for group in found)
        )

    def read_packed(self, expert: int) -> dict[str, Tensor]:
        """One expert with its matrices as MXFP4 `_blocks` and `_scales`, and plain biases. Only if `is_packed`."""
        assert isinstance(self._tensors, Mxfp4Tensors)
        parts: dict[str, Tensor] = {}
        tensor_of = {self._layer.stacked_name(name): name for name in self._layer.shape.module_shapes()}
        for group in self._groups:
            name, source = tensor_of[group.target], group.names[0]
            if source in self._tensors.recipes:
                parts[name + BLOCKS], parts[name + SCALES] = self._tensors.read_packed(source, expert)
            else:
                parts[name] = self._tensors.read_rows(source, expert, expert + 1)[0]
        return parts

    def _mine(self, group: SourceGroup) -> SourceGroup:
        """This layer's part of a module list; modules that share a list are consecutive in it."""
        check_per_expert(group)
        if not is_module_list(group):
            return group
        targets, num_experts = possible_targets(group), self._layer.num_experts
        check_module_list(group, num_experts * len(targets), num_spare=self._layer.num_spare)
        mine = set(self._layer.parameter_names())
        first = num_experts * next(i for i, target in enumerate(targets) if target in mine)
        sources = {pattern: names[first : first + num_experts] for pattern, names in group.sources.items()}
        return replace(group, sources=sources)

    def _convert_meta(self, group: SourceGroup) -> dict[str, Tensor]:
        """The conversion of one expert on `meta`: names and shapes only."""
        copies = len(possible_targets(group)) if is_module_list(group) else 1
        metas = {}
        for pattern, names in group.sources.items():
            entry = self._tensors.entries[names[0]]
            shape = entry.shape if is_module_list(group) else (1, *entry.shape[1:])
            metas[pattern] = [torch.empty(shape, dtype=entry.dtype, device="meta")] * copies
        return convert(group, metas, self._model)

    def _check_sources(self, group: SourceGroup) -> None:
        """Check that all experts' tensors have the first one's shape, or that a fused tensor holds all experts."""
        for names in group.sources.values():
            first = self._tensors.entries[names[0]]
            for entry in (self._tensors.entries[name] for name in names):
                if entry.shape != first.shape or entry.dtype not in WEIGHT_DTYPES:
                    raise CheckpointError(
                        f"{entry.path}: tensor {entry.name} is {entry.dtype} {list(entry.shape)}, expected floating "
                        f"point weights {list(first.shape)}."
                    )
            num_experts, num_spare = self._layer.num_experts, self._layer.num_spare
            num_found = first.shape[0] if first.shape else 0
            if not is_module_list(group) and not num_experts <= num_found <= num_experts + num_spare:
                raise CheckpointError(
                    f"{first.path}: tensor {first.name} is {list(first.shape)}, expected "
                    f"{num_experts} experts in its first dimension."
                )

    def _check_result(self) -> None:
        converted = {name: value for group in self._groups for name, value in self._convert_meta(group).items()}
        for name, shape in self._layer.shape.module_shapes().items():
            parameter = self._layer.stacked_name(name)
            if parameter not in converted:
                raise CheckpointError(f"No tensor of the checkpoint brings {parameter}.")
            if tuple(converted[parameter].shape) != (1, *shape):
                group = next(group for group in self._groups if parameter in possible_targets(group))
                entry = self._tensors.entries[group.names[0]]
                raise CheckpointError(
                    f"{entry.path}: tensor {entry.name} is {list(entry.shape)}; {parameter} needs {list(shape)} per "
                    f"expert and gets {list(converted[parameter].shape[1:])}."
                )
