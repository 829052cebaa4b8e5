"""GPTQ and AWQ: integers packed along inputs (GPTQ) or outputs (AWQ).

Bits and groups of a weight are derived from the shapes of its parts, since settings may differ from layer to layer
(GPTQModel's `dynamic`, AutoRound's `extra_config`). An unquantized layer has a plain `weight`.

Source: AutoGPTQ, nn_modules/qlinear; GPTQModel, quantization/config.py; AutoAWQ, utils/packing_utils.py; AutoRound,
inference/convert_model.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.packed import ADVICE, DAMAGED, check_fit, find_parts, finite, made_of, unpack
from offload_moe.checkpoint.tensors import DequantizedTensors, TensorSource
from offload_moe.errors import CheckpointError

GPTQ_BITS = (2, 3, 4, 8)
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # added to a stored zero
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # position of each output's code in a word


def gptq(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """GPTQ with or without reordered inputs. Raises: CheckpointError for other layouts of its tensors."""
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if settings.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ZERO_OFFSETS:
        raise CheckpointError(
            f"The checkpoint is GPTQ in the {layout} layout; {' and '.join(ZERO_OFFSETS)} can be read. {ADVICE}"
        )
    is_reordered = settings.get("desc_act") is True
    return DequantizedTensors(
        stored, [gptq_weight(stored, prefix, ZERO_OFFSETS[layout], is_reordered) for prefix in _prefixes(stored)]
    )


def awq(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """AutoAWQ's GEMM layout. Raises: CheckpointError for its others."""
    layout = str(settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm")
    bits = settings.get("bits", settings.get("w_bit", 4))
    if layout.lower() != "gemm" or str(bits) != "4":
        raise CheckpointError(
            f"The checkpoint is AWQ with {bits} bits in the {layout.lower()} layout; 4 bits in the gemm layout can be "
            f"read. {ADVICE}"
        )
    return DequantizedTensors(stored, [awq_weight(stored, prefix) for prefix in _prefixes(stored)])


def auto_round(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """AutoRound, whose weights are packed as in GPTQ or AWQ. Raises: CheckpointError for its other layouts."""
    layout = str(settings.get("packing_format") or "auto_round:auto_gptq")
    match layout.rpartition(":")[2]:
        case "auto_gptq" | "gptq" | "auto":
            return gptq(stored, {"checkpoint_format": "gptq"})
        case "auto_round" | "gptqmodel":
            return gptq(stored, {"checkpoint_format": "gptq_v2"})
        case "auto_awq" | "awq":
            return awq(stored, {})
    raise CheckpointError(f"The checkpoint is AutoRound in the {layout} layout, which cannot be read. {ADVICE}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqWeight:
    """GPTQ: ``qweight [K * bits / 32, O]``, ``qzeros [G, O * bits / 32]``, ``scales [G, O]``, ``g_idx [K]``.

    g_idx is the group of each input; without it groups are consecutive and of the same length.
    """

    is_by_rows: ClassVar[bool] = False
    entry: TensorEntry
    ingredients: tuple[str, ...]
    bits: int
    zero_offset: int

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """Raises: CheckpointError when a scale is not a finite number, or a group does not exist."""
        words, zero_words, scales, *named = (stored.read(name) for name in self.ingredients)
        num_inputs = self.entry.shape[1]
        groups = named[0].long() if named else torch.arange(num_inputs) // (num_inputs // len(scales))
        if not 0 <= groups.min() <= groups.max() < len(scales):
            raise CheckpointError(
                f"{self.entry.path}: tensor {self.ingredients[3]} names GPTQ groups that are not there. {DAMAGED}"
            )
        codes = unpack(words.T[start:stop], self.bits).int()
        zeros = (unpack(zero_words, self.bits).int() + self.zero_offset) & ((1 << self.bits) - 1)
        values = (codes - zeros.T[start:stop, groups]).float() * scales.float().T[start:stop, groups]
        return finite(self.entry, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqWeight:
    """AWQ in its GEMM layout, 4 bits: ``qweight [K, O/8]``, ``qzeros [G, O/8]``, ``scales [G, O]``."""

    is_by_rows: ClassVar[bool] = False
    entry: TensorEntry
    ingredients: tuple[str, ...]

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """Raises: CheckpointError when a scale is not a finite number."""
        words, zero_words, scales = (stored.read(name) for name in self.ingredients)
        codes, zeros = (
            unpack(part, 4).unflatten(1, (-1, len(AWQ_ORDER)))[..., AWQ_ORDER].flatten(1).float()
            for part in (words, zero_words)
        )
        values = (codes.unflatten(0, (len(scales), -1)) - zeros[:, None]) * scales.float()[:, None]  # [G, K/G, O]
        return finite(self.entry, values.flatten(0, 1).T[start:stop])


def gptq_weight(stored: TensorSource, prefix: str, zero_offset: int, is_reordered: bool) -> GptqWeight:
    """The weight ``prefix + "weight"``.

    is_reordered: groups are not consecutive, so g_idx is required.

    Raises: CheckpointError when a part is missing, or they do not fit together.
    """
    dimensions = {f"{prefix}{part}": 2 for part in ("qweight", "qzeros", "scales")} | {f"{prefix}g_idx": 1}
    parts = find_parts(stored, "GPTQ", dimensions, optional=() if is_reordered else (f"{prefix}g_idx",))
    words, zeros, scales, *groups = parts.values()
    num_rows, num_groups = words.shape[1], scales.shape[0]
    bits = zeros.shape[1] * 32 / max(1, num_rows)
    if bits.is_integer() and 0 < bits <= 16 and bits not in GPTQ_BITS:
        raise CheckpointError(
            f"{words.path}: tensor {words.name} is GPTQ with {bits:.0f} bits; {', '.join(map(str, GPTQ_BITS))} can be "
            f"read. {ADVICE}"
        )
    num_inputs = int(words.shape[0] * 32 / max(1, bits))
    fits = bits in GPTQ_BITS and num_inputs * bits == words.shape[0] * 32 and zeros.dtype == torch.int32
    fits = fits and scales.shape[1] == num_rows and zeros.shape[0] == num_groups > 0
    if groups:
        fits = fits and groups[0].shape == (num_inputs,) and groups[0].dtype in (torch.int32, torch.int64)
    else:
        fits = fits and num_inputs % num_groups == 0
    check_fit("GPTQ", parts, scales, fits)
    return GptqWeight(
        entry=made_of(f"{prefix}weight", words, scales, (num_rows, num_inputs)),
        ingredients=tuple(parts),
        bits=int(bits),
        zero_offset=zero_offset,
    )


def awq_weight(stored: TensorSource, prefix: str) -> AwqWeight:
    """The weight ``prefix + "weight"``. Raises: as `gptq_weight`."""
    parts = find_parts(stored, "AWQ", {f"{prefix}{part}": 2 for part in ("qweight", "qzeros", "scales")})
    words, zeros, scales = parts.values()
    num_inputs, num_rows, num_groups = words.shape[0], words.shape[1] * 8, scales.shape[0]
    fits = zeros.shape == (num_groups, words.shape[1]) and scales.shape[1] == num_rows and zeros.dtype == torch.int32
    check_fit("AWQ", parts, scales, fits and num_groups > 0 and num_inputs % num_groups == 0)
    return AwqWeight(entry=made_of(f"{prefix}weight", words, scales, (num_rows, num_inputs)), ingredients=tuple(parts))


def _prefixes(stored: TensorSource) -> list[str]:
    return [name.removesuffix("qweight") for name in stored.entries if name.endswith(".qweight")]
