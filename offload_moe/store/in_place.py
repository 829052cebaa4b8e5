"""A store whose records are the bytes of GGUF files where they lie: nothing is converted and nothing is copied.

Its folder holds what transformers reads, made of the files' metadata, and a `store.json` that names the files.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.gguf_records import GgufRecords, LayerRecords
from offload_moe.checkpoint.gguf_view import write_small_files
from offload_moe.native.kernels import panel_order
from offload_moe.quant import gguf
from offload_moe.quant.layout import weight_shape
from offload_moe.store.manifest import DataFile, DenseEntry, Layer, Manifest, Place, StoredFile
from offload_moe.store.order import Order, reorder
from offload_moe.store.store import Piece, Record, Store
from offload_moe.store.view import read_view, write_view
from offload_moe.store.windows import Window, window, window_starts
from offload_moe.system.folders import make_folder
from offload_moe.system.paths import MANIFEST_NAME

GGUF = gguf.GGUF


class InPlaceStore(Store):
    """The experts and dense matrices of a model in GGUF, in the types that they have there."""

    def __init__(self, folder: Path, source: str, paths: Sequence[Path]) -> None:
        """Find everything in the files. Raises: CheckpointError, UnsupportedModelError when they cannot be used so."""
        self._records = GgufRecords(Checkpoint(folder, gguf=tuple(paths)))
        self.notices = self._records.notices
        files = tuple(
            DataFile(name=str(path), num_bytes=path.stat().st_size, checksum=0, order="rows") for path in paths
        )
        metadata = tuple(
            StoredFile(name=path.name, num_bytes=path.stat().st_size, checksum=0)
            for path in sorted(folder.iterdir())
            if path.name != MANIFEST_NAME
        )
        super().__init__(
            folder,
            Manifest(
                source=source,
                revision=None,
                codec=GGUF,
                dense_codec=GGUF,
                layers=tuple(map(_layer, self._records.layers)),
                files=files,
                experts=(),
                dense=tuple(self._entry(name) for name in self._records.checkpoint.dense),
                metadata=metadata,
            ),
        )

    @property
    def experts_bytes(self) -> int:
        return sum(
            sum(run.num_bytes for run in records.runs(0)) * layer.num_experts
            for records, layer in zip(self._records.layers, self.layers, strict=True)
        )

    def record(self, layer: int, expert: int) -> Record:
        windows = self._windows(layer, expert)
        return Record(
            name=self._expert_name(layer, expert),
            path=windows[0].path,
            offset=windows[0].offset,
            num_bytes=windows[-1].end,
            checksum=0,
            windows=windows,
        )

    def place_of(self, name: str) -> None:
        """A record has no place of its own."""
        return

    order_of = place_of

    def read_expert(self, layer: int, expert: int, order: Order = "rows") -> Tensor:
        record = self._records.read_expert(layer, expert)
        reorder(record, self._panels_of(layer), "rows", order)
        return record

    def read_dense(self, name: str, order: Order = "rows") -> Tensor:
        entry = self.dense[name]
        if entry.quantized is None:
            return self._records.checkpoint.dense_tensor(name)
        record = self._records.read_dense(name)
        if not entry.is_lookup:
            reorder(record, panel_order(self.codec_of_dense(entry).name, entry.quantized), "rows", order)
        return record

    def read_ahead(self) -> None:
        """Dense matrices are read once, when they are loaded."""

    def pieces(self) -> Iterator[Piece]:
        """None: GGUF files have no checksums."""
        return iter(())

    def files_in_rows(self) -> list[DataFile]:
        """None: the files stay as they are."""
        return []

    def _windows(self, layer: int, expert: int) -> tuple[Window, ...]:
        runs = self._records.layers[layer].runs(expert)
        starts, _ = window_starts([(run.target, run.num_bytes) for run in runs])
        return tuple(
            window(run.path, run.offset, run.num_bytes, start, run.target)
            for run, start in zip(runs, starts, strict=True)
        )

    def _entry(self, name: str) -> DenseEntry:
        tensor, codec = self._records.checkpoint.dense[name], self._records.dense_codec(name)
        if codec is None:
            place = Place(file=0, offset=0, num_bytes=tensor.num_bytes, checksum=0)
            return DenseEntry(name=name, dtype=tensor.dtype, shape=tensor.shape, place=place)
        shape = weight_shape(*tensor.shape)
        num_bytes = codec.layout(shape).record_bytes
        return DenseEntry(
            name=name,
            dtype=torch.uint8,
            shape=(num_bytes,),
            place=Place(file=0, offset=0, num_bytes=num_bytes, checksum=0),
            quantized=shape,
            codec=codec.name,
            is_lookup=name == self._records.lookup_name,
        )


def open_view(folder: Path) -> InPlaceStore:
    """The store of a folder that stands for GGUF files. Raises: the errors of `read_view` and of `InPlaceStore`."""
    view = read_view(folder)
    return InPlaceStore(folder, view.source, view.paths)


def make_view(paths: Sequence[Path], folder: Path, source: str, *, has_data: bool = True) -> Path:
    """Write a folder that stands for these files, which stay where they are.

    has_data: see `write_small_files`. Raises: CheckpointError.
    """
    make_folder(folder)
    write_small_files(tuple(paths), folder, has_data=has_data)
    InPlaceStore(folder, source, paths)  # refuses before the manifest makes a store of the folder
    write_view(folder, source, paths)
    return folder


def _layer(records: LayerRecords) -> Layer:
    _, num_bytes = window_starts([(run.target, run.num_bytes) for run in records.runs(0)])
    whole = records.codec.layout(records.shape).record_bytes
    return Layer(
        name=records.name,
        num_experts=records.num_experts,
        record_bytes=max(num_bytes, whole),
        shape=records.shape,
        codec=records.codec.name,
    )
