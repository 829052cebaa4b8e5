"""bitsandbytes' 4-bit weights: ``weight`` uint8 ``[N/2, 1]`` with its quantization state in tensors named after it.

The state's last part, ``weight.quant_state.bitsandbytes__nf4`` (or fp4), is JSON in bytes: shape, dtype and block size.

Source: bitsandbytes/functional.py, `QuantState.as_dict` and `from_dict`.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.tensors import DequantizedTensors, TensorSource
from offload_moe.errors import CheckpointError

STATE = ".quant_state.bitsandbytes__"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def bitsandbytes(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """Raises: CheckpointError for 8-bit weights, or a damaged state."""
    if not settings.get("load_in_4bit", settings.get("_load_in_4bit")):
        raise CheckpointError(
            "The checkpoint is quantized with bitsandbytes to 8 bits, which cannot be read. Use a version of the model "
            "in bf16 or 4 bits."
        )
    states = [name for name in stored.entries if STATE in name]
    return DequantizedTensors(stored, [_recipe(stored, state) for state in states])


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight4Bit:
    """A weight and the tensors of its state."""

    is_by_rows: ClassVar[bool] = False
    entry: TensorEntry
    ingredients: tuple[str, ...]

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """Raises: CheckpointError when the state does not fit the weight."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        prefix = f"{self.entry.name}."
        parts = {name.removeprefix(prefix): stored.read(name) for name in self.ingredients if name != self.entry.name}
        try:
            state = QuantState.from_dict(parts, device=torch.device("cpu"))
            values = dequantize_4bit(stored.read(self.entry.name), state).view(self.entry.shape)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise CheckpointError(
                f"{self.entry.path}: tensor {self.entry.name} has a damaged state: {error}."
            ) from error
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{self.entry.path}: tensor {self.entry.name} has NaN or infinite weights.")
        return values[start:stop]


def _recipe(stored: TensorSource, state: str) -> Weight4Bit:
    name = state.split(STATE)[0]
    packed = stored.entries.get(name)
    if packed is None:
        raise CheckpointError(f"{stored.entries[state].path}: tensor {state} describes {name}, which is missing.")
    try:
        described = json.loads(bytes(stored.read(state).tolist()))
        shape, dtype = tuple(described["shape"]), DTYPES[described["dtype"]]
        lengths = _lengths(math.prod(shape), described["blocksize"], described.get("nested_blocksize"))
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{packed.path}: tensor {state} is not a quantization state: {error!r}.") from error
    if len(shape) != 2 or packed.dtype != torch.uint8 or math.prod(shape) != packed.num_bytes * 2 or min(shape) <= 0:
        raise CheckpointError(f"{packed.path}: tensor {name} has {packed.num_bytes} bytes for weights {list(shape)}.")
    for part, length in lengths.items():
        found = stored.entries.get(f"{name}.{part}")
        if found is None or math.prod(found.shape) != length:
            what = "is missing" if found is None else f"is {list(found.shape)}, expected {length} numbers"
            raise CheckpointError(f"{packed.path}: tensor {name}.{part} {what}.")
    return Weight4Bit(
        entry=TensorEntry(name=name, path=packed.path, dtype=dtype, shape=shape, offset=packed.offset),
        ingredients=(name, state, *(f"{name}.{part}" for part in lengths)),
    )


def _lengths(num_weights: int, block: int, nested_block: int | None) -> dict[str, int]:
    """How many numbers each part must have: bitsandbytes reads on without looking."""
    num_blocks = -(-num_weights // block)
    lengths = {"absmax": num_blocks, "quant_map": 16}
    if nested_block is None:
        return lengths
    return lengths | {"nested_absmax": -(-num_blocks // nested_block), "nested_quant_map": 256}
