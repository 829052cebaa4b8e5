"""compressed-tensors, as written by llm-compressor: the format of each weight follows from its parts.

A checkpoint may mix formats, with some layers unquantized; only the bits of packed integers are in the config alone.

Source: compressed-tensors, compressors/ and quantization/lifecycle/forward.py; utils/match.py for `config_groups`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offload_moe.checkpoint.fp8 import FP8_DTYPES, fp8_weight
from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.int8 import int8_weight
from offload_moe.checkpoint.mxfp4 import packed_rows
from offload_moe.checkpoint.packed import ADVICE, DAMAGED, check_fit, find_parts, finite, made_of, unpack
from offload_moe.checkpoint.tensors import DequantizedTensors, Recipe, TensorSource
from offload_moe.errors import CheckpointError

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
    "dense",
)
BITS = (4, 8)
PACKED = "weight_packed"
NVFP4_SCALE = "weight_global_scale"
IN_WEIGHTS = {"weight_input", "weight_output"}  # of transforms: what is stored is transformed already


def compressed_tensors(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """Recipes of all weights. Raises: CheckpointError for formats outside `FORMATS`, and for damaged parts."""
    sparsity = settings.get("sparsity_config")
    for found in (settings, sparsity if isinstance(sparsity, dict) else {}):
        layout = found.get("format") or "dense"
        if layout not in FORMATS:
            raise CheckpointError(
                f"The checkpoint is quantized with compressed-tensors ({layout}), of which {', '.join(FORMATS)} can be "
                f"read. {ADVICE}"
            )
    if nvfp4 := next((name for name in stored.entries if name.endswith(NVFP4_SCALE)), None):
        raise CheckpointError(
            f"{stored.entries[nvfp4].path}: tensor {nvfp4} belongs to a weight in NVFP4 (compressed-tensors), which "
            f"cannot be read. {ADVICE}"
        )
    _check_transforms(settings.get("transform_config"))
    schemes = Schemes(settings)
    return DequantizedTensors(stored, list(_recipes(stored, schemes)))


def _check_transforms(transforms: Any) -> None:
    """Raises: CheckpointError for rotations of activations (SpinQuant, QuIP), which undo those of the weights."""
    try:
        groups = (transforms or {}).get("config_groups") or {}
        places = {use["location"] for group in groups.values() for use in group["apply"]}
    except (AttributeError, KeyError, TypeError):
        places = {"unknown"}
    if computed := sorted(str(place) for place in places - IN_WEIGHTS):
        raise CheckpointError(
            f"The checkpoint (compressed-tensors) has transforms of activations (transform_config: "
            f"{', '.join(computed)}), without which its weights are wrong, and which are not computed here. {ADVICE}"
        )


class Schemes:
    """The `config_groups` of a checkpoint: the quantization of its modules."""

    def __init__(self, settings: dict[str, Any]) -> None:
        groups = settings.get("config_groups")
        listed = list(groups.values()) if isinstance(groups, dict) else []
        self._schemes = [(group.get("targets"), group.get("weights")) for group in listed if isinstance(group, dict)]

    def bits(self, module: str) -> int:
        """The bits of a module's packed integers. Raises: CheckpointError when no group has them or supports them."""
        weights = self._weights(module)
        bits = weights.get("num_bits")
        if type(bits) is not int or bits not in BITS:
            raise CheckpointError(
                f"Tensor {module}.{PACKED} is compressed-tensors with {bits} bits; {' and '.join(map(str, BITS))} can "
                f"be read. {ADVICE}"
            )
        return bits

    def block(self, module: str) -> tuple[int, int] | None:
        """Rows and columns that share a scale, if the strategy is blocks or groups."""
        weights = self._weights(module)
        block, group = weights.get("block_structure"), weights.get("group_size")
        if type(group) is int and group > 0:
            return 1, group
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
            return block[0], block[1]
        return None

    def _weights(self, module: str) -> dict[str, Any]:
        """The group that names the module, else the first that names a class of modules, else the first."""
        named = [weights for targets, weights in self._schemes if _names(targets, module)]
        classes = [weights for targets, weights in self._schemes if _names_a_class(targets)]
        for weights in (*named, *classes, *(weights for _, weights in self._schemes)):
            if isinstance(weights, dict):
                return weights
        return {}


def _names(targets: object, module: str) -> bool:
    for target in targets if isinstance(targets, list) else []:
        if target == module:
            return True
        if isinstance(target, str) and target.startswith("re:"):
            try:
                if re.match(target.removeprefix("re:"), module):
                    return True
            except re.error as error:
                raise CheckpointError(f"quantization_config: target {target!r} is no pattern: {error}.") from error
    return False


def _names_a_class(targets: object) -> bool:
    return isinstance(targets, list) and any(isinstance(target, str) and target.isidentifier() for target in targets)


def _recipes(stored: TensorSource, schemes: Schemes) -> Iterator[Recipe]:
    for entry in stored.entries.values():
        name = entry.name
        module = name.rpartition(".")[0]
        if name.endswith(PACKED):
            if entry.dtype == torch.uint8:
                yield packed_rows(stored, name, f"{name.removesuffix('_packed')}_scale", name.removesuffix("_packed"))
            else:
                yield compressed_weight(stored, name.removesuffix("_packed"), schemes.bits(module))
        elif name.endswith("weight") and entry.dtype in FP8_DTYPES:
            yield fp8_weight(stored, entry, schemes.block(module))
        elif name.endswith("weight") and entry.dtype == torch.int8:
            yield int8_weight(stored, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedWeight:
    """``_packed [O, K * bits / 32]``, ``_scale [O, G]``, ``_shape [2]``, and perhaps ``_zero_point`` and ``_g_idx``.

    Zeros are int8 ``[O, G]`` or packed along outputs, int32 ``[O * bits / 32, G]``; the default is the middle code.
    """

    is_by_rows: ClassVar[bool] = True
    entry: TensorEntry
    ingredients: tuple[str, ...]
    bits: int

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """Values of rows. Raises: CheckpointError when a scale is not finite, or `_shape` differs."""
        name = self.entry.name
        if stored.read(f"{name}_shape").tolist() != list(self.entry.shape):
            raise CheckpointError(
                f"{self.entry.path}: tensor {name}_shape is not {list(self.entry.shape)}, the codes are: the weight is "
                f"not in {self.bits} bits. {DAMAGED}"
            )
        codes = unpack(stored.read_rows(f"{name}_packed", start, stop), self.bits).float()
        scales = stored.read_rows(f"{name}_scale", start, stop).float()
        zeros = self._zeros(stored, start, stop, scales)
        if (groups := self._groups(stored, scales.shape[1])) is not None:
            return finite(self.entry, (codes - zeros[:, groups]) * scales[:, groups])
        values = (codes.unflatten(1, (scales.shape[1], -1)) - zeros[:, :, None]) * scales[:, :, None]
        return finite(self.entry, values.flatten(1))

    def _zeros(self, stored: TensorSource, start: int, stop: int, scales: Tensor) -> Tensor:
        middle, name = 1 << (self.bits - 1), f"{self.entry.name}_zero_point"
        if name not in self.ingredients:
            return torch.full_like(scales, middle)
        if stored.entries[name].dtype == torch.int8:
            return stored.read_rows(name, start, stop).float() + middle
        return unpack(stored.read(name).T, self.bits).T[start:stop].float()

    def _groups(self, stored: TensorSource, num_groups: int) -> Tensor | None:
        """The group of each input; None if groups are consecutive (an index of -1 was never set)."""
        name = f"{self.entry.name}_g_idx"
        if name not in self.ingredients or (groups := stored.read(name).long()).eq(-1).any():
            return None
        if not 0 <= groups.min() <= groups.max() < num_groups:
            raise CheckpointError(f"{self.entry.path}: tensor {name} names groups that are not there. {DAMAGED}")
        return groups


def compressed_weight(stored: TensorSource, name: str, bits: int) -> CompressedWeight:
    """The weight `name`. Raises: CheckpointError when a part is missing or parts do not fit together."""
    optional = (f"{name}_zero_point", f"{name}_g_idx")
    dimensions = {f"{name}_packed": 2, f"{name}_scale": 2, f"{name}_shape": 1, optional[0]: 2, optional[1]: 1}
    parts = find_parts(stored, "compressed-tensors", dimensions, optional)
    packed, scale = parts[f"{name}_packed"], parts[f"{name}_scale"]
    (num_rows, words), (scale_rows, num_groups) = packed.shape, scale.shape
    num_inputs = words * 32 // bits
    fits = num_rows == scale_rows and bool(num_groups) and num_inputs % num_groups == 0
    if zeros := parts.get(optional[0]):
        is_plain = zeros.dtype == torch.int8 and zeros.shape == scale.shape
        is_packed = zeros.dtype == torch.int32 and zeros.shape == (num_rows * bits / 32, num_groups)
        fits = fits and (is_plain or is_packed)
    if groups := parts.get(optional[1]):
        fits = fits and groups.shape == (num_inputs,) and groups.dtype in (torch.int32, torch.int64)
    check_fit("compressed-tensors", parts, scale, fits)
    return CompressedWeight(
        entry=made_of(name, packed, scale, (num_rows, num_inputs)), ingredients=tuple(parts), bits=bits
    )
