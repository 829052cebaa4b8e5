"""Integer weights packed into int32 words: the common part of compressed-tensors' pack-quantized, GPTQ and AWQ.

All represent ``weight [O, K] = (code - zero) * scale`` with a scale, and optionally a zero, per group of inputs.
Words hold their codes from the lowest bits up. Values are in the dtype of the scales.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.tensors import TensorSource
from offload_moe.errors import CheckpointError

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADVICE = "Use a version of the model in bf16 or FP8."
DAMAGED = "Download the checkpoint again, or use a version of the model in bf16 or FP8."


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 ``[R, C]`` -> uint8 ``[R, C * 32 / bits]``; a code may lie across two words."""
    numbers = words.contiguous().view(torch.uint8)
    if bits == 8:
        return numbers
    if bits == 4:
        return torch.stack([numbers & 15, numbers >> 4], dim=-1).flatten(1)
    single = torch.from_numpy(np.unpackbits(numbers.numpy(), axis=1, bitorder="little"))
    codes: Tensor = single.unflatten(1, (-1, bits))
    return (codes << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def find_parts(
    stored: TensorSource, method: str, dimensions: Mapping[str, int], optional: Iterable[str] = ()
) -> dict[str, TensorEntry]:
    """The entries of one weight by name; the first is the one with the codes.

    dimensions: their number for each part. optional: parts that may be missing.

    Raises: CheckpointError when another part is missing, or belongs to no matrix.
    """
    first = stored.entries[next(iter(dimensions))]
    found = {}
    for name, num_dimensions in dimensions.items():
        entry = stored.entries.get(name)
        if entry is None and name in optional:
            continue
        if entry is None:
            raise CheckpointError(f"{first.path}: tensor {first.name} is {method}, but {name} is missing. {DAMAGED}")
        if len(entry.shape) != num_dimensions:
            raise CheckpointError(
                f"{entry.path}: tensor {name} is {list(entry.shape)}, which belongs to no {method} matrix. {DAMAGED}"
            )
        found[name] = entry
    return found


def check_fit(method: str, parts: Mapping[str, TensorEntry], scales: TensorEntry, fits: bool) -> None:
    """Check the parts' dtypes and `fits`. Raises: CheckpointError."""
    words = next(iter(parts.values()))
    if not fits or words.dtype != torch.int32 or scales.dtype not in SCALE_DTYPES or 0 in words.shape:
        found = ", ".join(f"{name} {entry.dtype} {list(entry.shape)}" for name, entry in parts.items())
        raise CheckpointError(f"{words.path}: the parts of a {method} weight do not fit together: {found}. {DAMAGED}")


def made_of(name: str, codes: TensorEntry, scales: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    """The entry of the weight that codes and scales represent."""
    return TensorEntry(name=name, path=codes.path, dtype=scales.dtype, shape=shape, offset=codes.offset)


def finite(entry: TensorEntry, values: Tensor) -> Tensor:
    """`values` in the dtype of `entry`. Raises: CheckpointError when one is not a finite number there."""
    converted = values.to(entry.dtype)
    if not torch.isfinite(converted).all():
        raise CheckpointError(f"{entry.path}: tensor {entry.name} has NaN or infinite weights. {DAMAGED}")
    return converted
