"""The reading side of an expert store: the place of every record, and the check of its bytes."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from offload_moe.errors import ConfigError, StoreCorrupt, StoreError
from offload_moe.native.kernels import PanelOrder, panel_order
from offload_moe.quant import Codec, codec_names, get_codec, is_built_in
from offload_moe.store.manifest import MTP, DataFile, DenseEntry, Layer, Manifest, Place
from offload_moe.store.manifest_json import read_manifest
from offload_moe.store.order import Order, reorder
from offload_moe.store.reading import check, read_checked, touch
from offload_moe.store.view import is_view
from offload_moe.store.windows import Window
from offload_moe.system.paths import MANIFEST_NAME, file_advice


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The place of one expert: `offset` and `num_bytes` are multiples of 4096. `name` is for messages.

    panels: in which its rows are on the disk; None: they are one after another. windows: of a record whose parts lie
    apart and have no checksum; the other fields are then those of the first, and `num_bytes` those of the slot.
    """

    name: str
    path: Path
    offset: int
    num_bytes: int
    checksum: int
    panels: PanelOrder | None = None
    windows: tuple[Window, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that it lies in."""
        return tuple(dict.fromkeys(part.path for part in self.windows)) or (self.path,)

    def place_at(self, start: int) -> tuple[Path, int]:
        """The file and the offset in it of a byte of the slot."""
        inside = next((part for part in reversed(self.windows) if part.start <= start), None)
        return (
            (self.path, self.offset + start) if inside is None else (inside.path, inside.offset + start - inside.start)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A range of bytes with a checksum; `name` describes it.

    panels: in which the rows of a record can be, whether they are or not; None for anything else.
    """

    name: str
    path: Path
    place: Place
    panels: PanelOrder | None = None

    def check(self) -> None:
        """Read and compare. Raises: StoreCorrupt, StoreError naming the file and the piece."""
        check(self.path, self.place, self.name)


def is_store(path: Path | str) -> bool:
    """Whether the folder has a manifest; `Store.open` checks that the store is usable."""
    return (Path(path) / MANIFEST_NAME).is_file()


class Store:
    """A finished expert store, which is immutable.

    `layers` and `dense` are the model's own. Experts for multi-token prediction are those of the layers behind them.

    open_view: opens a folder that stands for GGUF files; `in_place.py` sets it.
    """

    open_view: ClassVar[Callable[[Path], "Store"]]
    notices: tuple[str, ...] = ()  # for the user

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.source = manifest.source
        self.revision = manifest.revision
        self.codec = manifest.codec
        self.dense_codec = manifest.dense_codec
        self.scales = manifest.scales
        self.importances, self.adapter = manifest.importances, manifest.adapter
        self.layers: tuple[Layer, ...] = manifest.layers[: manifest.num_layers]
        self._all_dense = {entry.name: entry for entry in manifest.dense}
        self.dense: Mapping[str, DenseEntry] = {
            name: entry for name, entry in self._all_dense.items() if not name.startswith(MTP)
        }
        self.manifest = manifest
        self._first = [sum(layer.num_experts for layer in manifest.layers[:i]) for i in range(len(manifest.layers))]

    @classmethod
    def open(cls, path: Path | str) -> "Store":
        """Read the manifest and check that every file is there in full; checksums are left to `pieces`.

        Raises:
            StoreError: not a store, not finished, or in a codec that no installed package has.
            StoreVersion: another format version wrote it.
            StoreCorrupt: a file is missing or cut short, or the manifest contradicts itself.
            ConfigError: its codec is of an extension that is broken.
        """
        folder = Path(path)
        if folder.is_file():
            raise StoreError(file_advice(folder))
        if is_view(folder):
            return cls.open_view(folder)
        store = cls(folder, read_manifest(folder))
        store._check_layouts()
        for file in (*store.manifest.files, *store.manifest.metadata):
            try:
                found = (folder / file.name).stat().st_size
            except OSError as error:
                raise StoreCorrupt(f"{folder / file.name} is missing: {error.strerror}.") from error
            if found != file.num_bytes:
                raise StoreCorrupt(
                    f"{folder / file.name} has {found} bytes, {file.num_bytes} were written. Quantize the model again."
                )
        return store

    @property
    def num_experts(self) -> int:
        """The most experts any layer has."""
        return max(layer.num_experts for layer in self.layers)

    @property
    def has_tokenizer(self) -> bool:
        names = [file.name for file in self.manifest.metadata]
        return any(n.startswith(("tokenizer", "vocab", "tekken")) or n.endswith((".model", ".tiktoken")) for n in names)

    @property
    def mtp(self) -> "Store | None":
        """What is kept for multi-token prediction, as a store of its own; None where that is nothing."""
        part = self.manifest.mtp
        return None if part is None else Store(self.path, part)

    @property
    def experts_bytes(self) -> int:
        return sum(layer.num_experts * layer.record_bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        return sum(entry.place.num_bytes for entry in self.dense.values())

    @property
    def mtp_bytes(self) -> int:
        """What is kept for multi-token prediction."""
        part = self.mtp
        return 0 if part is None else part.experts_bytes + part.dense_bytes

    def codec_of(self, layer: int) -> Codec:
        """The codec of a layer's experts."""
        return get_codec(self.manifest.layers[layer].codec or self.codec)

    def codec_of_dense(self, entry: DenseEntry) -> Codec:
        """The codec of the record of a quantized linear."""
        return get_codec(entry.codec or self.dense_codec)

    def record(self, layer: int, expert: int) -> Record:
        """The place of an expert's record; `layer` is the ordinal of the MoE layer."""
        place = self._place(layer, expert)
        return Record(
            name=self._expert_name(layer, expert),
            path=self._file(place),
            offset=place.offset,
            num_bytes=place.num_bytes,
            checksum=place.checksum,
            panels=self._panels_of(layer) if self._order(place) == "panels" else None,
        )

    def order_of(self, name: str) -> Order | None:
        """The order of rows in the file of the tensor `name`, which is as for `place_of`."""
        place = self._place_of(name)
        return None if place is None else self._order(place)

    def place_of(self, name: str) -> tuple[Path, int, int] | None:
        """File, offset and length of the tensor `name` of a data file: a dense tensor, or an expert's record."""
        place = self._place_of(name)
        return None if place is None else (self._file(place), place.offset, place.num_bytes)

    def read_expert(self, layer: int, expert: int, order: Order = "rows") -> Tensor:
        """The record, uint8 ``[record_bytes]``, checked. order: of its rows, where the codec has panels.

        Raises: StoreCorrupt naming the expert and its file.
        """
        place = self._place(layer, expert)
        record = read_checked(self._file(place), place, self._expert_name(layer, expert))
        reorder(record, self._panels_of(layer), self._order(place), order)
        return record

    def read_dense(self, name: str, order: Order = "rows") -> Tensor:
        """A dense tensor, checked; if `dense[name].quantized` is set, the uint8 record of a linear.

        order: of the rows of a record, where the codec has panels. Raises: StoreCorrupt naming the tensor and its file.
        """
        entry = self.dense[name]
        data = read_checked(self._file(entry.place), entry.place, name)
        if not entry.is_lookup:
            reorder(data, self._panels_of_linear(entry), self._order(entry.place), order)
        return data.view(entry.dtype).view(entry.shape)

    def dense_tensors(self, order: Order = "rows") -> Iterator[tuple[DenseEntry, Tensor]]:
        """Every dense entry with its tensor, read one at a time, the largest first to limit the peak of memory."""
        for entry in self._largest_first():
            yield entry, self.read_dense(entry.name, order)

    def read_ahead(self) -> None:
        """Let the system read the dense tensors into the page cache in the background."""
        places = [(self._file(entry.place), entry.place) for entry in self._largest_first()]
        threading.Thread(target=touch, args=(places,), name="read-ahead", daemon=True).start()

    def _largest_first(self) -> list[DenseEntry]:
        return sorted(self.dense.values(), key=lambda entry: -entry.place.num_bytes)

    def pieces(self) -> Iterator[Piece]:
        """All of the store but its manifest: small files, headers, dense tensors, experts."""
        for file in self.manifest.metadata:
            whole = Place(file=0, offset=0, num_bytes=file.num_bytes, checksum=file.checksum)
            yield Piece(name="the file", path=self.path / file.name, place=whole)
        for place, name, panels in self._places():
            yield Piece(name=name, path=self._file(place), place=place, panels=panels)

    def files_in_rows(self) -> list[DataFile]:
        """The data files with records that have panels but are not in them: those that `upgrade` rewrites."""
        with_panels = self._files_with_panels()
        files = enumerate(self.manifest.files)
        return [file for index, file in files if file.order == "rows" and index in with_panels]

    def _files_with_panels(self) -> set[int]:
        """Indices of the data files with records that have panels, whether they are in them or not."""
        return {place.file for place, _, panels in self._places() if panels is not None}

    def _places(self) -> Iterator[tuple[Place, str, PanelOrder | None]]:
        """Places in data files with their names and, of records, panels."""
        header_bytes = [file.num_bytes for file in self.manifest.files]
        for place in (*self.manifest.experts, *(entry.place for entry in self.manifest.dense)):
            header_bytes[place.file] = min(header_bytes[place.file], place.offset)
        for index, file in enumerate(self.manifest.files):
            place = Place(file=index, offset=0, num_bytes=header_bytes[index], checksum=file.checksum)
            yield place, "the header", None
        for entry in self.manifest.dense:
            yield entry.place, entry.name, self._panels_of_linear(entry)
        for layer, description in enumerate(self.manifest.layers):
            panels = self._panels_of(layer)
            for expert in range(description.num_experts):
                yield self._place(layer, expert), self._expert_name(layer, expert), panels

    def _place_of(self, name: str) -> Place | None:
        if name in self._all_dense:
            return self._all_dense[name].place
        match, layers = re.fullmatch(r"layers\.(\d{1,9})\.experts\.(\d{1,9})", name), self.manifest.layers
        layer, expert = (int(match[1]), int(match[2])) if match else (len(layers), 0)
        is_there = layer < len(layers) and expert < layers[layer].num_experts
        return self._place(layer, expert) if is_there else None

    def _place(self, layer: int, expert: int) -> Place:
        assert 0 <= expert < self.manifest.layers[layer].num_experts
        return self.manifest.experts[self._first[layer] + expert]

    def _expert_name(self, layer: int, expert: int) -> str:
        return f"expert {expert} of layer {layer} ({self.manifest.layers[layer].name})"

    def _order(self, place: Place) -> Order:
        return self.manifest.files[place.file].order

    def _panels_of(self, layer: int) -> PanelOrder | None:
        return panel_order(self.codec_of(layer).name, self.manifest.layers[layer].shape)

    def _panels_of_linear(self, entry: DenseEntry) -> PanelOrder | None:
        if entry.quantized is None or entry.is_lookup:
            return None
        return panel_order(self.codec_of_dense(entry).name, entry.quantized)

    def _file(self, place: Place) -> Path:
        return self.path / self.manifest.files[place.file].name

    def _check_layouts(self) -> None:
        """Check the records' lengths against the codec, since arithmetic would read past shorter ones."""
        has_extension = not is_built_in(self.codec)
        if has_extension and self.codec not in codec_names():
            raise StoreError(
                f"{self.path} is in the codec {self.codec!r}, which is neither built in nor registered by an installed "
                "package. Install the package that has it, or quantize the model again."
            )
        try:
            sizes = [
                (layer.name, layer.record_bytes, self.codec_of(index).layout(layer.shape))
                for index, layer in enumerate(self.manifest.layers)
            ]
            sizes += [
                (entry.name, entry.place.num_bytes, self.codec_of_dense(entry).layout(entry.quantized))
                for entry in self.manifest.dense
                if entry.quantized
            ]
        except ConfigError as error:
            if has_extension:
                raise
            raise StoreCorrupt(f"{self.path / MANIFEST_NAME}: {error}") from error
        for name, num_bytes, layout in sizes:
            if layout.record_bytes != num_bytes:
                raise StoreCorrupt(f"{self.path / MANIFEST_NAME}: {name} has records of {num_bytes} bytes.")
        with_panels = self._files_with_panels()
        for index, file in enumerate(self.manifest.files):
            if file.order == "panels" and index not in with_panels:
                raise StoreCorrupt(f"{self.path / MANIFEST_NAME}: {file.name} has no records that have panels.")
