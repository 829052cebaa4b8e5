"""The weights of one model among the tensors of a checkpoint, for reading expert by expert."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from offload_moe.checkpoint.adapter import AdaptedTensors
from offload_moe.checkpoint.convert import convert, possible_targets
from offload_moe.checkpoint.expert_reader import ExpertReader
from offload_moe.checkpoint.experts import ExpertsModule, find_experts
from offload_moe.checkpoint.names import SourceGroup, required_names
from offload_moe.checkpoint.piece_reader import PieceReader
from offload_moe.checkpoint.tensors import TensorSource, row_runs
from offload_moe.checkpoint.ties import untie
from offload_moe.errors import CheckpointError
from offload_moe.families.text_model import TextModel

COMPARED_BYTES = 1 << 22  # read at a time of a tensor, for each byte of a number


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTensor:
    """A parameter or persistent buffer that is not a routed expert, under its name in the model."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ModelWeights:
    """Names, shapes and pieces; at most one piece is in memory.

    `model` is the skeleton on `meta`; `layers` are its experts modules in order; `dense` is everything else.
    """

    model: TextModel
    layers: tuple[ExpertsModule, ...]
    dense: dict[str, DenseTensor]

    def __init__(
        self, folder: Path, model: TextModel, tensors: TensorSource, shared: frozenset[str] = frozenset()
    ) -> None:
        """shared: parameters of the model that belong to another one."""
        self.folder, self.model, self.tensors = folder, model, tensors
        self.layers = tuple(find_experts(model))
        self.dense = {}
        self._shared = shared
        self._dense_groups: dict[str, SourceGroup] = {}
        self._brought_as: dict[str, str] = {}
        self._last_converted: tuple[SourceGroup | None, dict[str, Tensor]] = (None, {})
        self._readers: list[ExpertReader | PieceReader] = []

    def match(self, groups: tuple[SourceGroup, ...], *, can_compare: bool) -> tuple[str, ...]:
        """Find everything in the tensors of these groups. Returns notices for the user.

        can_compare: whether values can be read.

        Raises: CheckpointError when a tensor is missing, or of a wrong shape or dtype.
        """
        by_layer = self._sort_groups(groups)
        notices = tuple(self._settle_ties(can_compare=can_compare))
        self._check_complete()
        self._readers = [
            ExpertReader(layer, groups, self.model, self._tensors_of(groups))
            if layer.is_stacked
            else PieceReader(layer, groups, self.model, self._tensors_of(groups))
            for layer, groups in zip(self.layers, by_layer, strict=True)
        ]
        return notices

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """One expert's tensors by parameter name, in the module's layout and the checkpoint's dtype."""
        return self._readers[layer].read(expert)

    def expert_paths(self, layer: int, expert: int) -> frozenset[Path]:
        """The shards that hold this expert."""
        return frozenset().union(*(self.tensors.paths_of(name) for name in self._readers[layer].names(expert)))

    def dense_paths(self, name: str) -> frozenset[Path]:
        """The shards that hold this dense tensor."""
        return frozenset().union(*(self.tensors.paths_of(source) for source in self._dense_groups[name].names))

    @property
    def is_mxfp4(self) -> bool:
        """Whether every expert is stored in MXFP4."""
        return all(reader.is_packed for reader in self._readers)

    def packed_expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """One expert in the MXFP4 codec's input form, without dequantization. Only if `is_mxfp4`."""
        return self._readers[layer].read_packed(expert)

    def dense_tensor(self, name: str) -> Tensor:
        """One dense tensor whole, in the checkpoint's dtype."""
        group = self._dense_groups[name]
        if group.converter is None:
            return self.tensors.read(group.names[0])
        last = self._last_converted
        if last[0] is not group:  # tensors split from one source are read one after another
            tensors = {p: [self.tensors.read(source) for source in names] for p, names in group.sources.items()}
            last = self._last_converted = (group, convert(group, tensors, self.model))
        return last[1][self._brought_as.get(name, name)]

    def dense_rows(self, name: str, run_bytes: int) -> Iterator[Tensor]:
        """A dense tensor in groups of rows; whole if it is converted, or if its format cannot be read by rows."""
        group = self._dense_groups[name]
        if self._is_by_rows(name):
            yield from row_runs(self.tensors, group.names[0], run_bytes)
        else:
            yield self.dense_tensor(name)

    def dense_chunks(self, name: str, chunk_bytes: int) -> Iterator[Tensor]:
        """The bytes of one dense tensor, uint8; a tensor that is only renamed is never whole in memory."""
        group = self._dense_groups[name]
        if group.converter is None:
            yield from self.tensors.chunks(group.names[0], chunk_bytes)
        else:
            yield self.dense_tensor(name).contiguous().reshape(-1).view(torch.uint8)

    def _tensors_of(self, groups: list[SourceGroup]) -> TensorSource:
        """The source of experts; those that an adapter leaves alone keep the bits of a quantized checkpoint."""
        if not isinstance(self.tensors, AdaptedTensors):
            return self.tensors
        is_changed = self.tensors.changes(name for group in groups for name in group.names)
        return self.tensors if is_changed else self.tensors.stored

    def _is_by_rows(self, name: str) -> bool:
        group = self._dense_groups[name]
        return group.converter is None and self.tensors.is_by_rows(group.names[0])

    def _settle_ties(self, *, can_compare: bool) -> Iterator[str]:
        """Keep one of the tensors that share a weight, under the name that the others are tied to.

        Tensors that differ are not tied. can_compare: if False, they are assumed to differ.
        """
        tied = self.model.all_tied_weights_keys
        for target, source in list(tied.items()):
            if target not in self.dense:
                continue
            if source not in self.dense:
                self.dense[source] = replace(self.dense.pop(target), name=source)
                self._dense_groups[source] = self._dense_groups.pop(target)
                self._brought_as[source] = target
            elif can_compare and self._are_equal(target, source):
                del self.dense[target], self._dense_groups[target]
            else:
                untie(self.model, (target, source))
                yield (
                    f"The config ties {target} to {source}, but the checkpoint brings both: each keeps its own values, "
                    "as transformers has it."
                )

    def _are_equal(self, one: str, other: str) -> bool:
        """Compare two tensors up to the first difference."""
        if self._is_by_rows(one) and self._is_by_rows(other):
            both = [self.dense_rows(name, COMPARED_BYTES * self.dense[name].dtype.itemsize) for name in (one, other)]
        else:
            both = [iter((self.dense_tensor(name),)) for name in (one, other)]
        return all(torch.equal(left.float(), right.float()) for left, right in zip(*both, strict=True))

    def _check_complete(self) -> None:
        found = {*self._dense_groups, *self._experts_parameters(), *self._shared}
        missing = sorted(required_names(self.model) - found)
        if not missing:
            return
        could_share = set(self.model._tied_weights_keys or ()) & set(missing)
        hint = f' If {missing[0]} is the embedding, config.json must say "tie_word_embeddings": true.'
        raise CheckpointError(
            f"{self.folder}: no tensor brings {missing[0]} ({len(missing)} parameters are missing)."
            f"{hint if could_share == set(missing) else ''}"
        )

    def _experts_parameters(self) -> set[str]:
        return {name for layer in self.layers for name in layer.parameter_names()}

    def _sort_groups(self, groups: tuple[SourceGroup, ...]) -> list[list[SourceGroup]]:
        """Split groups into those of each layer and dense ones, which are registered."""
        owner = {name: index for index, layer in enumerate(self.layers) for name in layer.parameter_names()}
        by_layer: list[list[SourceGroup]] = [[] for _ in self.layers]
        state = self.model.state_dict()
        for group in groups:
            targets = possible_targets(group)
            layers = sorted({owner[target] for target in targets if target in owner})
            for layer in layers:
                by_layer[layer].append(group)
            if not layers:
                self._register_dense(group, state)
        return by_layer

    def _register_dense(self, group: SourceGroup, state: dict[str, Tensor]) -> None:
        entries = {name: self.tensors.entries[name] for name in group.names}
        metas = {
            pattern: [torch.empty(entries[n].shape, dtype=entries[n].dtype, device="meta") for n in names]
            for pattern, names in group.sources.items()
        }
        first = entries[group.names[0]]
        for name, value in convert(group, metas, self.model).items():
            expected = state.get(name)
            if expected is None or expected.shape != value.shape:
                raise CheckpointError(
                    f"{first.path}: tensor {first.name} is {list(first.shape)}; {name} needs "
                    f"{list(expected.shape) if expected is not None else 'no such parameter'}."
                )
            if not _compatible(value.dtype, expected.dtype):
                raise CheckpointError(
                    f"{first.path}: tensor {first.name} is {first.dtype}; {name} needs {expected.dtype}."
                )
            self.dense[name] = DenseTensor(name=name, dtype=value.dtype, shape=tuple(value.shape))
            self._dense_groups[name] = group


def _compatible(found: torch.dtype, expected: torch.dtype) -> bool:
    """Floating point weights may have any width from 16 bits; integers and booleans must match."""
    if expected.is_floating_point:
        return found.is_floating_point and found.itemsize >= 2
    return found == expected
