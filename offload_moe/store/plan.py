"""The places of all bytes of a store, computed before the first byte is written.

Every size follows from shapes and codecs, so headers are written first, and a resumed conversion computes the same
plan.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from offload_moe.quant import ExpertShape
from offload_moe.quant.layout import RECORD_ALIGNMENT, round_up
from offload_moe.store.manifest_json import DTYPE_NAMES, FORMAT_NAME
from offload_moe.store.order import Order

WRITTEN_BY = f"{FORMAT_NAME} 1"  # headers do not depend on the order of rows: an upgrade keeps them
FILE_BYTES = 4 << 30  # a file is closed before it grows past this, except for one larger tensor alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """One planned tensor of a store: a record with its order of rows, or an unquantized dense tensor.

    codec, is_lookup: see `DenseEntry`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    quantized: ExpertShape | None = None
    order: Order = "rows"
    codec: str | None = None
    is_lookup: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A safetensors file: its header, padded so that data starts on a record boundary, then its blobs in order."""

    name: str
    header: bytes
    blobs: tuple[Blob, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(blob.num_bytes for blob in self.blobs)

    @property
    def order(self) -> Order:
        """Of the rows in its records."""
        return "panels" if any(blob.order == "panels" for blob in self.blobs) else "rows"

    def offsets(self) -> list[int]:
        """The offset of each blob from the start of the file."""
        position = len(self.header)
        offsets = []
        for blob in self.blobs:
            offsets.append(position)
            position += blob.num_bytes
        return offsets


def record_blob(name: str, record_bytes: int, quantized: ExpertShape | None = None, *, order: Order = "rows") -> Blob:
    return Blob(
        name=name, dtype=torch.uint8, shape=(record_bytes,), num_bytes=record_bytes, quantized=quantized, order=order
    )


def plan_files(
    prefix: str, blobs: Iterable[Blob], file_bytes: int = FILE_BYTES, *, first: int = 1
) -> list[PlannedFile]:
    """Spread blobs over `prefix-NNNNN.safetensors`, in their order. first: the number of the first file."""
    batches: list[list[Blob]] = []
    room = 0
    for blob in blobs:
        if not batches or blob.num_bytes > room:
            batches.append([])
            room = file_bytes
        batches[-1].append(blob)
        room -= blob.num_bytes
    return [
        PlannedFile(name=f"{prefix}-{number:05}.safetensors", header=header_of(batch), blobs=tuple(batch))
        for number, batch in enumerate(batches, start=first)
    ]


def header_of(blobs: Sequence[Blob]) -> bytes:
    """The beginning of a file of these blobs: the same bytes for the same blobs."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "written_by": WRITTEN_BY}}
    position = 0
    for blob in blobs:
        entries[blob.name] = {
            "dtype": DTYPE_NAMES[blob.dtype],
            "shape": list(blob.shape),
            "data_offsets": [position, position + blob.num_bytes],
        }
        position += blob.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(round_up(len(text) + 8, RECORD_ALIGNMENT) - 8)
    return len(text).to_bytes(8, "little") + text
