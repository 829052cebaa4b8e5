"""Experts in one tensor each, as in llama.cpp before April 2024 (Mixtral), read as one tensor for all.

Source: llama.cpp, pull request 6505, which merged them; gguf-py, gguf/constants.py before it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from offload_moe.checkpoint.gguf_file import GgufTensor
from offload_moe.errors import CheckpointError

ONE_EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.(weight|bias)")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufExperts:
    """The tensors of all experts of a layer in order, ``[E, ...]``."""

    name: str
    experts: tuple[GgufTensor, ...]

    @property
    def path(self) -> Path:
        return self.experts[0].path

    @property
    def paths(self) -> frozenset[Path]:
        return frozenset(expert.path for expert in self.experts)

    @property
    def offset(self) -> int:
        return self.experts[0].offset

    @property
    def kind(self) -> str:
        return self.experts[0].kind if len({expert.kind for expert in self.experts}) == 1 else "several"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.experts), *self.experts[0].shape)

    @property
    def row_bytes(self) -> int:
        return self.experts[0].row_bytes

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, (expert.dtype for expert in self.experts))

    def item(self, index: int) -> GgufTensor:
        """As `GgufTensor.item`."""
        return self.experts[index]

    def raw(self, start: int, stop: int) -> Tensor:
        """As `GgufTensor.raw`. Only if all experts have one type."""
        return torch.stack([expert.raw(0, expert.shape[0]) for expert in self.experts[start:stop]])

    def rows(self, start: int, stop: int) -> Tensor:
        """As `GgufTensor.rows`."""
        return torch.stack([expert.rows(0, expert.shape[0]).to(self.dtype) for expert in self.experts[start:stop]])


def stacked(tensors: Mapping[str, GgufTensor]) -> dict[str, GgufTensor | GgufExperts]:
    """`tensors` with the experts of a layer under one name.

    Raises: CheckpointError naming an expert that is missing, or of another shape.
    """
    found: dict[str, GgufTensor | GgufExperts] = {}
    experts: dict[str, dict[int, GgufTensor]] = {}
    for name, tensor in tensors.items():
        if match := ONE_EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}_exps.{match[3]}", {})[int(match[2])] = tensor
        else:
            found[name] = tensor
    for name, numbered in experts.items():
        _check(name, numbered)
        found[name] = GgufExperts(name=name, experts=tuple(numbered[number] for number in sorted(numbered)))
    return found


def _check(name: str, numbered: Mapping[int, GgufTensor]) -> None:
    first = numbered[min(numbered)]
    for number in range(len(numbered)):
        missing = name.replace("_exps.", f".{number}.")
        if number not in numbered:
            raise CheckpointError(
                f"{first.path}: tensor {missing} is missing, though experts up to {max(numbered)} are there. Download "
                "the file again."
            )
        if numbered[number].shape != first.shape:
            raise CheckpointError(
                f"{first.path}: tensor {missing} is {list(numbered[number].shape)}, but {first.name} is "
                f"{list(first.shape)}. Download the file again."
            )
