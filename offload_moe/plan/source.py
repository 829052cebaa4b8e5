"""From a source to a config and the bytes to download, without reading weights."""

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.gguf_hub import find_gguf
from offload_moe.checkpoint.gguf_split import is_gguf
from offload_moe.checkpoint.header import read_header
from offload_moe.checkpoint.mtp import brings_mtp
from offload_moe.checkpoint.names import map_names
from offload_moe.checkpoint.skeleton import build_skeleton, load_config
from offload_moe.checkpoint.weight_files import INDEX_NAME, choose_weights, file_names, refuse_adapter
from offload_moe.convert.gguf_source import view_of_headers
from offload_moe.convert.sources import ensure_view
from offload_moe.errors import CheckpointError, OffloadMoeError
from offload_moe.plan.hub import fetch_config
from offload_moe.store import Store, is_store
from offload_moe.store.in_place import GGUF, InPlaceStore
from offload_moe.system.names import check_model, hub_name, resolve, split_gguf_name
from offload_moe.system.paths import CONFIG_NAME, MANIFEST_NAME, file_advice

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG_SUFFIXES = (".json", ".txt", "")  # a config file may have any name, but weights are none


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSource:
    """A model to be planned. codec and dense_codec: of a store, else None.

    checkpoint_bytes: of the weight files, None if unknown. is_local: the files are on this disk.
    shard_bytes: of the largest file of a hub id, else None. dense_names: of the tensors that are loaded beside the
    experts; empty if unknown, or irrelevant because the model ties no weights. tensor_names: of a checkpoint; empty if
    unknown. has_mtp: False where it is known to have no layer for multi-token prediction.
    """

    name: str
    config: "PreTrainedConfig"
    checkpoint_bytes: int | None = None
    is_local: bool = False
    shard_bytes: int | None = None
    codec: str | None = None
    dense_codec: str | None = None
    dense_names: Collection[str] = ()
    tensor_names: Collection[str] = ()
    has_mtp: bool = True
    store: Store | None = None  # where its records have codecs of their own


def open_source(model: str | Path, *, revision: str | None = None, token: str | None = None) -> PlannedSource:
    """A store, a GGUF file, a checkpoint folder, a config file, or a hub id, of which only the config is fetched.

    Of a GGUF file on the hub only the header is.

    Raises:
        CheckpointError: it is none of these, or its config or index is not usable.
        UnsupportedModelError: transformers does not have the model.
        TransferError: the hub cannot be reached or refuses.
    """
    check_model(model, revision)
    model, revision = hub_name(model, revision)
    path = resolve(model)
    if split_gguf_name(str(model)) is not None and not path.exists():
        return _of_hub_gguf(str(model), revision, token)
    if is_gguf(path):
        path = ensure_view(path, str(model))
    if is_store(path):
        return _of_store(path, str(model))
    if path.is_dir():
        refuse_adapter(path, file_names(path))
        num_bytes, is_local = _folder_bytes(path)
        config = load_config(path)
        return PlannedSource(
            name=str(model),
            config=config,
            checkpoint_bytes=num_bytes,
            is_local=is_local,
            dense_names=_dense_names(path) if is_local and _may_tie(config) else (),
            tensor_names=_tensor_names(path) if brings_mtp(config, ()) else (),
        )
    if path.is_file() and (path.suffix.lower() not in CONFIG_SUFFIXES or path.name == MANIFEST_NAME):
        raise CheckpointError(file_advice(path))
    if path.is_file():
        with _as_folder(path) as folder:
            return PlannedSource(name=str(model), config=load_config(folder))
    hub = fetch_config(str(model), revision=revision, token=token)
    config = load_config(hub.folder)
    return PlannedSource(
        name=str(model),
        config=config,
        checkpoint_bytes=sum(hub.sizes) if hub.sizes else None,
        shard_bytes=max(hub.sizes) if hub.sizes else None,
        dense_names=_mapped(config, hub.tensor_names) if hub.tensor_names and _may_tie(config) else (),
        tensor_names=hub.tensor_names,
    )


def _of_hub_gguf(name: str, revision: str | None, token: str | None) -> PlannedSource:
    found = find_gguf(name, revision=revision, token=token)
    if (path := found.cached()) is not None:
        return _of_store(ensure_view(path, name), name)
    with view_of_headers(found) as view:
        return replace(_of_store(view, name), is_local=False)


def _of_store(folder: Path, name: str) -> PlannedSource:
    store = Store.open(folder)
    views = store.manifest.files if isinstance(store, InPlaceStore) else ()
    return PlannedSource(
        name=name,
        config=load_config(folder),
        checkpoint_bytes=sum(file.num_bytes for file in views) or None,
        is_local=True,
        codec=store.codec,
        dense_codec=store.dense_codec,
        dense_names=store.dense.keys(),
        has_mtp=store.mtp is not None,
        store=store if store.codec == GGUF else None,
    )


def index_bytes(folder: Path) -> int | None:
    """The total bytes in the safetensors index; None without an index or without a total.

    Raises: CheckpointError when the index cannot be read.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    try:
        num_bytes = json.loads(path.read_text(encoding="utf-8")).get("metadata", {}).get("total_size")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a shard index: {error}. Download it again.") from error
    return int(num_bytes) if isinstance(num_bytes, int | float) and num_bytes > 0 else None


def _folder_bytes(folder: Path) -> tuple[int | None, bool]:
    """Bytes of the weights, and whether the files exist or only the index."""
    try:
        paths = [folder / name for name in choose_weights(folder).names]
    except CheckpointError:  # an unreadable index is reported below
        paths = []
    if paths and all(path.is_file() for path in paths):
        return sum(path.stat().st_size for path in paths), True
    return index_bytes(folder), False


def _may_tie(config: "PreTrainedConfig") -> bool:
    parts = (config, *(getattr(config, name, None) for name in config.sub_configs))
    return any(getattr(part, "tie_word_embeddings", False) for part in parts)


def _dense_names(folder: Path) -> Collection[str]:
    try:
        with Checkpoint(folder) as checkpoint:
            return checkpoint.dense.keys()
    except OffloadMoeError:  # a plan needs only the config; a conversion reports the error
        return ()


def _tensor_names(folder: Path) -> Collection[str]:
    """By the index, or by the headers of the files; empty if neither can be read."""
    try:
        weights = choose_weights(folder)
        paths = [folder / name for name in weights.names if (folder / name).is_file()]
        return weights.promised.keys() or {name for path in paths for name in read_header(path)}
    except OffloadMoeError:  # as above
        return ()


def _mapped(config: "PreTrainedConfig", tensor_names: Collection[str]) -> Collection[str]:
    try:
        groups = map_names(build_skeleton(config), tensor_names).groups
    except OffloadMoeError:  # as above
        return ()
    return {group.target for group in groups}


@contextmanager
def _as_folder(config_file: Path) -> Iterator[Path]:
    """A folder with a config file of any name as its `config.json`; errors name the file itself."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copyfile(config_file, folder / CONFIG_NAME)
        try:
            yield folder
        except OffloadMoeError as error:
            message = str(error).replace(str(folder / CONFIG_NAME), str(config_file))
            raise type(error)(message.replace(str(folder), str(config_file))) from error
