"""Layers of gated delta rules out of GGUF files: the converter's changes of Qwen3-Next and Qwen3.5 are undone.

Shape legend: K heads of keys, V heads of values, k and v their dims, H hidden.

Source: llama.cpp, conversion/qwen.py, `Qwen3NextModel` and `_LinearAttentionVReorderBase`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from offload_moe.errors import CheckpointError

ARCHITECTURES = ("qwen3next", "qwen35moe")
_IN_BLOCK = re.compile(r"blk\.(\d+)\.(attn_qkv|attn_gate|ssm_\w+)(?:\.\w+)?")
_FIELDS = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")


@dataclass(frozen=True, slots=True)
class Heads:
    """Numbers of heads and their dims."""

    num_keys: int
    num_values: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Those of a config. Raises: CheckpointError for one without usable numbers."""
        numbers: list[Any] = [config.get(name) for name in _FIELDS]
        if any(type(number) is not int or number <= 0 for number in numbers) or numbers[1] % numbers[0]:
            raise CheckpointError(f"config.json has no usable {', '.join(_FIELDS)}: {numbers}.")
        return cls(*numbers)

    def grouped(self, size: int, rows: Tensor) -> Tensor:
        """Rows of V heads of `size` each: a key's heads, which lie K apart in the file, come together."""
        apart: Tensor = rows.unflatten(0, (self.num_values // self.num_keys, self.num_keys, size))
        return apart.transpose(0, 1).flatten(0, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaPart:
    """A tensor of a layer. name: in transformers. beside: a second tensor of the file that it is made of.

    moves_rows: `join` changes nothing but the order of rows. columns_moved: or of so many columns that stay together.
    """

    name: str
    join: Callable[..., Tensor]
    beside: str | None = None
    moves_rows: bool = False
    columns_moved: int | None = None


def delta_part(name: str, architecture: str, config: Mapping[str, Any]) -> DeltaPart | None:
    """What a tensor of the file becomes; None for a tensor of another kind, and for the second one of a pair."""
    match = _IN_BLOCK.fullmatch(name)
    if match is None:
        return None
    heads, of_qwen3_next, block = Heads.of(config), architecture == "qwen3next", f"blk.{match[1]}."
    made = (_OF_QWEN3_NEXT if of_qwen3_next else _OF_QWEN3_5).get(match[2])
    if made is None:
        return None
    inside, join, moves_rows = made
    return DeltaPart(
        name=f"model.layers.{match[1]}.linear_attn.{inside}",
        join=partial(join, heads),
        beside=f"{block}attn_gate.weight" if of_qwen3_next and match[2] == "attn_qkv" else None,
        moves_rows=moves_rows,
        columns_moved=heads.value_dim if join is _columns else None,
    )


def is_second(name: str, architecture: str) -> bool:
    """Whether a tensor is made a part of another one."""
    return architecture == "qwen3next" and name.endswith(".attn_gate.weight")


def less_one(weight: Tensor) -> Tensor:
    """A norm's weight, to which the converter added one."""
    return weight - 1


def _same(heads: Heads, tensor: Tensor) -> Tensor:
    return tensor


def _by_key(heads: Heads, mixed: Tensor, gates: Tensor) -> Tensor:
    """Queries, keys and values ``[2 K k + V v, H]`` and gates ``[V v, H]``: those of each head of keys together."""
    keys = heads.num_keys * heads.key_dim
    parts = (*mixed.split([keys, keys, heads.num_values * heads.value_dim]), gates)
    return torch.cat([part.unflatten(0, (heads.num_keys, -1)) for part in parts], dim=1).flatten(0, 1)


def _mixed(heads: Heads, mixed: Tensor) -> Tensor:
    """Rows of queries, keys and values: those of values are grouped by the head of keys."""
    keys = 2 * heads.num_keys * heads.key_dim
    return torch.cat([mixed[:keys], heads.grouped(heads.value_dim, mixed[keys:])])


def _values(heads: Heads, rows: Tensor) -> Tensor:
    return heads.grouped(heads.value_dim, rows)


def _numbers(heads: Heads, rows: Tensor) -> Tensor:
    return heads.grouped(1, rows)


def _columns(heads: Heads, matrix: Tensor) -> Tensor:
    return heads.grouped(matrix.shape[1] // heads.num_values, matrix.T).T.contiguous()


def _kernels(heads: Heads, kernels: Tensor) -> Tensor:
    return kernels[:, None]


def _mixed_kernels(heads: Heads, kernels: Tensor) -> Tensor:
    return _mixed(heads, kernels)[:, None]


def _logarithm(heads: Heads, decay: Tensor) -> Tensor:
    """Raises: ValueError for a decay that has none."""
    if not decay.is_meta and not bool(((decay < 0) & decay.isfinite()).all()):
        raise ValueError(f"decays from {decay.min().item():g} to {decay.max().item():g}, where all are negative")
    return (-decay).log()


def _grouped_logarithm(heads: Heads, decay: Tensor) -> Tensor:
    return _numbers(heads, _logarithm(heads, decay))


_Made = Mapping[str, tuple[str, Callable[..., Tensor], bool]]
_OF_QWEN3_NEXT: _Made = {
    "attn_qkv": ("in_proj_qkvz.weight", _by_key, True),
    "ssm_in": ("in_proj_qkvz.weight", _same, True),  # as files had it at first
    "ssm_ba": ("in_proj_ba.weight", _same, True),
    "ssm_out": ("out_proj.weight", _same, True),
    "ssm_norm": ("norm.weight", _same, False),
    "ssm_conv1d": ("conv1d.weight", _kernels, False),
    "ssm_dt": ("dt_bias", _same, False),
    "ssm_a": ("A_log", _logarithm, False),
}
_OF_QWEN3_5: _Made = {
    "attn_qkv": ("in_proj_qkv.weight", _mixed, True),
    "attn_gate": ("in_proj_z.weight", _values, True),
    "ssm_beta": ("in_proj_b.weight", _numbers, True),
    "ssm_alpha": ("in_proj_a.weight", _numbers, True),
    "ssm_out": ("out_proj.weight", _columns, False),
    "ssm_norm": ("norm.weight", _same, False),
    "ssm_conv1d": ("conv1d.weight", _mixed_kernels, False),
    "ssm_dt": ("dt_bias", _numbers, False),
    "ssm_a": ("A_log", _grouped_logarithm, False),
}
