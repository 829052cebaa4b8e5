"""`store.json` as text, and back. Written last, so a folder without it is no store.

See docs/formats.md for the format. What is read may come from a damaged or hostile file, so every field is checked
before it is used as a size, an offset or a file name.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offload_moe.checkpoint.header import DTYPES
from offload_moe.errors import StoreCorrupt, StoreError, StoreVersion
from offload_moe.native.kernels import crc32
from offload_moe.quant import ABSMAX, ExpertShape, Matrix
from offload_moe.quant.layout import RECORD_ALIGNMENT
from offload_moe.store.manifest import (
    DATA_FILE,
    MTP,
    DataFile,
    DenseEntry,
    Importances,
    Layer,
    Manifest,
    MergedAdapter,
    Place,
    StoredFile,
)
from offload_moe.store.order import Order
from offload_moe.system.paths import MANIFEST_NAME

FORMAT_NAME = "offload-moe expert store"
FORMAT_VERSION = 2
CODECS_VERSION = 3  # each layer and each linear has a codec of its own
MTP_VERSION = 4  # with a layer for multi-token prediction
ROWS_VERSION = 1  # the rows of all records are one after another, and files have no order
VERSIONS = (ROWS_VERSION, FORMAT_VERSION, CODECS_VERSION, MTP_VERSION)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SMALL_FILE = re.compile(r"(additional_chat_templates/)?[\w-][\w.-]*")
MAX_NUMBER = 1 << 53  # larger JSON numbers are not exact in every reader, and no model has them


def shape_to_json(shape: ExpertShape) -> dict[str, Any]:
    return {
        "matrices": [[m.name, m.out_features, m.in_features] for m in shape.matrices],
        "biases": [list(bias) for bias in shape.biases],
        "is_transposed": shape.is_transposed,
        "is_interleaved": shape.is_interleaved,
    }


def manifest_to_json(manifest: Manifest) -> str:
    """The text of `store.json`: the same bytes for the same store."""
    document: dict[str, Any] = {
        "format": FORMAT_NAME,
        "version": _version_of(manifest),
        "source": manifest.source,
        "revision": manifest.revision,
        "codec": manifest.codec,
        "dense_codec": manifest.dense_codec,
        "scales": manifest.scales,
        **({} if manifest.importances is None else {"importances": asdict(manifest.importances)}),
        **({} if manifest.adapter is None else {"adapter": asdict(manifest.adapter)}),
        "layers": [
            {
                "name": layer.name,
                "num_experts": layer.num_experts,
                "record_bytes": layer.record_bytes,
                "shape": shape_to_json(layer.shape),
                **({} if layer.codec is None else {"codec": layer.codec}),
            }
            for layer in manifest.layers
        ],
        "files": [[file.name, file.num_bytes, file.checksum, file.order] for file in manifest.files],
        "experts": [[place.file, place.offset, place.checksum] for place in manifest.experts],
        "dense": [
            {
                "name": entry.name,
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "place": [entry.place.file, entry.place.offset, entry.place.num_bytes, entry.place.checksum],
                "quantized": shape_to_json(entry.quantized) if entry.quantized else None,
                **({} if entry.codec is None else {"codec": entry.codec, "is_lookup": entry.is_lookup}),
            }
            for entry in manifest.dense
        ],
        "metadata": [[file.name, file.num_bytes, file.checksum] for file in manifest.metadata],
    }
    document["checksum"] = _checksum(document)
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in document.items()) + "\n}\n"


def _version_of(manifest: Manifest) -> int:
    """The oldest version that has all that is in it."""
    if manifest.num_layers < len(manifest.layers):
        return MTP_VERSION
    return CODECS_VERSION if any(layer.codec for layer in manifest.layers) else FORMAT_VERSION


def _checksum(document: dict[str, Any]) -> int:
    return crc32(json.dumps(document, sort_keys=True).encode())


def _lines(value: object) -> str:
    """JSON with one line per item of a list, so that a person can find an expert and a diff stays short."""
    if isinstance(value, list) and value:
        return "[\n " + ",\n ".join(json.dumps(item) for item in value) + "\n]"
    return json.dumps(value)


def read_manifest(folder: Path) -> Manifest:
    """Read and check `store.json`.

    Raises:
        StoreError: not a store, or one that was not finished.
        StoreVersion: written by a later version.
        StoreCorrupt: malformed.
    """
    path = folder / MANIFEST_NAME
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{folder} is not an expert store: it has no {MANIFEST_NAME}.") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise StoreCorrupt(f"{path} is damaged: {error}. Quantize the model again.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
        raise StoreError(f"{path} does not describe an expert store.")
    if document.get("version") not in VERSIONS:
        raise StoreVersion(
            f"{folder} is a store of format version {document.get('version')}, this program reads versions "
            f"{VERSIONS[0]} to {VERSIONS[-1]}. Quantize the model again, or use the program that wrote it."
        )
    if document.pop("checksum", None) != _checksum(document):
        raise StoreCorrupt(f"{path} does not match its own checksum. Quantize the model again.")
    try:
        return _manifest(document)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StoreCorrupt(f"{path} is malformed ({error!r}). Quantize the model again.") from error


def _manifest(document: dict[str, Any]) -> Manifest:
    has_orders = document["version"] != ROWS_VERSION
    files = tuple(_data_file(fields if has_orders else [*fields, "rows"]) for fields in document["files"])
    if len({file.name.replace("-panels", "") for file in files}) != len(files):
        raise ValueError("a data file is listed twice")
    layers = tuple(_layer(fields) for fields in document["layers"])
    are_mtp = [layer.name.startswith(MTP) for layer in layers]
    if are_mtp != sorted(are_mtp) or all(are_mtp):
        raise ValueError("layers for multi-token prediction that are not behind the model's own")
    record_bytes = [layer.record_bytes for layer in layers for _ in range(layer.num_experts)]
    places = document["experts"]
    if not places or len(places) != len(record_bytes):
        raise ValueError(f"{len(places)} experts listed, {len(record_bytes)} in the layer table")
    dense = tuple(_dense(fields, files) for fields in document["dense"])
    if len({entry.name for entry in dense}) != len(dense):
        raise ValueError("a dense tensor is listed twice")
    return Manifest(
        source=_text(document["source"]),
        revision=None if document["revision"] is None else _text(document["revision"]),
        codec=_text(document["codec"]),
        dense_codec=_text(document["dense_codec"]),
        scales=_text(document.get("scales", ABSMAX)),
        importances=_importances(document.get("importances")),
        adapter=_adapter(document.get("adapter")),
        layers=layers,
        files=files,
        experts=tuple(
            _place((file, offset, num_bytes, checksum), files, RECORD_ALIGNMENT)
            for (file, offset, checksum), num_bytes in zip(places, record_bytes, strict=True)
        ),
        dense=dense,
        metadata=tuple(_small_file(fields) for fields in document["metadata"]),
    )


def _importances(fields: dict[str, Any] | None) -> Importances | None:
    if fields is None:
        return None
    return Importances(kind=_text(fields["kind"]), name=_text(fields["name"]), sha256=_text(fields["sha256"]))


def _adapter(fields: dict[str, Any] | None) -> MergedAdapter | None:
    return None if fields is None else MergedAdapter(name=_text(fields["name"]), sha256=_text(fields["sha256"]))


def _layer(fields: dict[str, Any]) -> Layer:
    num_experts, record_bytes = _number(fields["num_experts"]), _number(fields["record_bytes"])
    if not 0 < num_experts <= 1 << 20:
        raise ValueError(f"{num_experts} experts in one layer")
    if record_bytes == 0 or record_bytes % RECORD_ALIGNMENT:
        raise ValueError(f"records of {record_bytes} bytes are not aligned")
    return Layer(
        name=_text(fields["name"]),
        num_experts=num_experts,
        record_bytes=record_bytes,
        shape=_shape(fields["shape"]),
        codec=_text(fields["codec"]) if "codec" in fields else None,
    )


def _shape(fields: dict[str, Any]) -> ExpertShape:
    flags = fields["is_transposed"], fields["is_interleaved"]
    if not all(isinstance(flag, bool) for flag in flags):
        raise TypeError("flags of an expert shape")
    matrices = tuple(
        Matrix(name=_text(name), out_features=_number(out_features), in_features=_number(in_features))
        for name, out_features, in_features in fields["matrices"]
    )
    if not matrices or not all(m.out_features and m.in_features for m in matrices):
        raise ValueError("an expert without weights")
    if len({matrix.name for matrix in matrices}) != len(matrices):
        raise ValueError("an expert with two matrices of one name")
    biases = tuple((_text(name), _number(length)) for name, length in fields["biases"])
    shape = ExpertShape(matrices=matrices, biases=biases, is_transposed=flags[0], is_interleaved=flags[1])
    if shape.has_gate and matrices[0].out_features % 2:
        raise ValueError(f"{matrices[0].out_features} rows, half of them of the gate")
    return shape


def _dense(fields: dict[str, Any], files: tuple[DataFile, ...]) -> DenseEntry:
    quantized = None if fields["quantized"] is None else _shape(fields["quantized"])
    entry = DenseEntry(
        name=_text(fields["name"]),
        dtype=DTYPES[fields["dtype"]],
        shape=tuple(_number(size) for size in fields["shape"]),
        place=_place(fields["place"], files, RECORD_ALIGNMENT if quantized else 1),
        quantized=quantized,
        codec=_text(fields["codec"]) if "codec" in fields else None,
        is_lookup=fields.get("is_lookup") is True,
    )
    if math.prod(entry.shape) * entry.dtype.itemsize != entry.place.num_bytes:
        raise ValueError(f"{entry.name} is {list(entry.shape)} in {entry.place.num_bytes} bytes")
    return entry


def _place(fields: Sequence[object], files: tuple[DataFile, ...], alignment: int) -> Place:
    file, offset, num_bytes, checksum = (_number(field) for field in fields)
    if offset % alignment or offset + num_bytes > files[file].num_bytes:
        raise ValueError(f"bytes {offset} to {offset + num_bytes} of {files[file].name}")
    return Place(file=file, offset=offset, num_bytes=num_bytes, checksum=checksum)


def _data_file(fields: list[Any]) -> DataFile:
    name, num_bytes, checksum, order = fields
    if DATA_FILE.fullmatch(_text(name)) is None:
        raise ValueError(f"file name {name!r}")
    return DataFile(name=name, num_bytes=_number(num_bytes), checksum=_number(checksum), order=_order(order))


def _order(value: object) -> Order:
    if value == "rows" or value == "panels":
        return value
    raise ValueError(f"{value!r} where the order of rows belongs")


def _small_file(fields: list[Any]) -> StoredFile:
    name, num_bytes, checksum = fields
    if _SMALL_FILE.fullmatch(_text(name)) is None or name == MANIFEST_NAME:
        raise ValueError(f"file name {name!r}")
    return StoredFile(name=name, num_bytes=_number(num_bytes), checksum=_number(checksum))


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < MAX_NUMBER:
        raise ValueError(f"{value!r} where a count belongs")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where a name belongs")
    return value
