"""bitsandbytes' weights. 4 bits: ``weight [N/2, 1]`` with its quantization state in tensors named after it.

The bytes may be under any dtype (`bnb_4bit_quant_storage`, for FSDP). The state's last part, named
``weight.quant_state.bitsandbytes__nf4`` (or fp4), is JSON in bytes: shape, dtype and block size. Fused experts have
three dimensions (bitsandbytes.nn.parametrize). 8 bits: ``weight`` int8 with ``SCB``.

Source: bitsandbytes/functional.py, `QuantState.as_dict` and `from_dict`; nn/parametrize.py.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.int8 import llm_int8_weight
from offload_moe.checkpoint.packed import DAMAGED, finite
from offload_moe.checkpoint.tensors import DequantizedTensors, TensorSource
from offload_moe.errors import CheckpointError

STATE = ".quant_state.bitsandbytes__"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def bitsandbytes(stored: TensorSource, settings: dict[str, Any]) -> DequantizedTensors:
    """Raises: CheckpointError for a damaged state."""
    in_4_bits = [_recipe(stored, name) for name in stored.entries if STATE in name]
    in_8_bits = [llm_int8_weight(stored, name) for name in stored.entries if name.endswith(".SCB")]
    return DequantizedTensors(stored, [*in_4_bits, *in_8_bits])


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight4Bit:
    """A weight, the tensors of its state, and the block sizes in it.

    nested_block: 0 if absmax is not nested.
    """

    is_by_rows: ClassVar[bool] = True
    entry: TensorEntry
    ingredients: tuple[str, ...]
    kind: str
    block: int
    nested_block: int
    nested_offset: float

    def rows(self, stored: TensorSource, start: int, stop: int) -> Tensor:
        """Raises: CheckpointError when a scale is not a finite number."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # As one long row, because bitsandbytes' kernel for the CPU is wrong if rows are not whole blocks.
        row_length = math.prod(self.entry.shape[1:])
        first, last = start * row_length, stop * row_length
        block, end_block = first // self.block, -(-last // self.block)
        begin, end = block * self.block, min(end_block * self.block, math.prod(self.entry.shape))
        state = QuantState(
            absmax=self._absmax(stored, block, end_block),
            shape=torch.Size([end - begin]),
            blocksize=self.block,
            quant_type=self.kind,
            dtype=self.entry.dtype,
        )
        values = dequantize_4bit(_bytes(stored, self.entry.name, begin // 2, -(-end // 2)).view(-1, 1), state)
        return finite(self.entry, values.flatten()[first - begin : last - begin].view(-1, *self.entry.shape[1:]))

    def _absmax(self, stored: TensorSource, first: int, last: int) -> Tensor:
        """Scales, fp32, of the blocks from first to last."""
        name = f"{self.entry.name}.absmax"
        if not self.nested_block:
            return stored.read_rows(name, first, last).float()
        from bitsandbytes.functional import dequantize_blockwise

        block = first // self.nested_block
        begin = block * self.nested_block
        absmax = dequantize_blockwise(
            stored.read_rows(name, begin, last),
            absmax=stored.read_rows(f"{self.entry.name}.nested_absmax", block, -(-last // self.nested_block)),
            code=stored.read(f"{self.entry.name}.nested_quant_map"),
            blocksize=self.nested_block,
        )
        absmax += self.nested_offset
        return absmax[first - begin :]


def _bytes(stored: TensorSource, name: str, begin: int, end: int) -> Tensor:
    """Bytes of a tensor ``[N, 1]`` or ``[1, N]``, whose dtype may be wider."""
    entry = stored.entries[name]
    width = entry.dtype.itemsize
    if entry.shape[0] == 1:
        return stored.read(name).contiguous().view(-1).view(torch.uint8)[begin:end]
    items = stored.read_rows(name, begin // width, -(-end // width))
    return items.contiguous().view(-1).view(torch.uint8)[begin % width :][: end - begin]


def _recipe(stored: TensorSource, state: str) -> Weight4Bit:
    name, _, kind = state.partition(STATE)
    packed = stored.entries.get(name)
    if packed is None:
        raise CheckpointError(
            f"{stored.entries[state].path}: tensor {state} describes {name}, which is missing. {DAMAGED}"
        )
    try:
        described = json.loads(bytes(stored.read(state).tolist()))
        shape, dtype, block = tuple(described["shape"]), DTYPES[described["dtype"]], described["blocksize"]
        nested = described.get("nested_blocksize") or 0
        offset = float(described["nested_offset"]) if nested else 0.0
        lengths = _lengths(math.prod(shape), block, nested)
        if kind not in ("nf4", "fp4") or block not in BLOCK_SIZES or not _are_sizes(*shape, block, nested or 1):
            raise ValueError(f"{kind}, shape {shape}, blocks of {block} and {nested}")
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise CheckpointError(
            f"{packed.path}: tensor {state} is not a quantization state of bitsandbytes: {error!r}. {DAMAGED}"
        ) from error
    if len(shape) not in (2, 3) or -(-math.prod(shape) // 2) != packed.num_bytes:
        raise CheckpointError(
            f"{packed.path}: tensor {name} has {packed.num_bytes} bytes for weights {list(shape)} in 4 bits "
            f"(bitsandbytes). {DAMAGED}"
        )
    for part, length in lengths.items():
        found = stored.entries.get(f"{name}.{part}")
        is_code = part == "absmax" and nested > 0
        if found is None or found.shape != (length,) or (found.dtype == torch.uint8) != is_code:
            what = f"is {found.dtype} {list(found.shape)}, expected {length} numbers" if found else "is missing"
            raise CheckpointError(f"{packed.path}: tensor {name}.{part} (bitsandbytes) {what}. {DAMAGED}")
    return Weight4Bit(
        entry=TensorEntry(name=name, path=packed.path, dtype=dtype, shape=shape, offset=packed.offset),
        ingredients=(name, state, *(f"{name}.{part}" for part in lengths)),
        kind=kind,
        block=block,
        nested_block=nested,
        nested_offset=offset,
    )


def _are_sizes(*numbers: object) -> bool:
    return all(type(number) is int and number > 0 for number in numbers)


def _lengths(num_weights: int, block: int, nested_block: int) -> dict[str, int]:
    """The required length of each part, which bitsandbytes does not check."""
    num_blocks = -(-num_weights // block)
    lengths = {"absmax": num_blocks, "quant_map": 16}
    if not nested_block:
        return lengths
    return lengths | {"nested_absmax": -(-num_blocks // nested_block), "nested_quant_map": 256}
