"""From a source (a store, a checkpoint folder, a hub id, the demo) to an expert store on disk."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from offload_moe import demo
from offload_moe.checkpoint.gguf_split import is_gguf, model_name, parts_beside
from offload_moe.checkpoint.source import check_folder, resolve_source
from offload_moe.checkpoint.weight_files import choose_weights
from offload_moe.convert.gguf_source import download_gguf
from offload_moe.convert.jobs import MXFP4
from offload_moe.convert.quantize import DEFAULT, default_codec, quantize
from offload_moe.errors import CheckpointError
from offload_moe.store import is_store
from offload_moe.store.in_place import GGUF, make_view
from offload_moe.store.installed import DEMO_IS_NOT_BUILT, check_finished
from offload_moe.store.view import FORMAT_VERSION
from offload_moe.system.names import DEMO, STORES, check_model, hub_name, resolve, split_gguf_name
from offload_moe.system.paths import CONFIG_NAME, cache_dir, file_advice
from offload_moe.system.progress import Progress, log_notice, silent


def find_source(name: str | Path) -> str | Path:
    """Resolve a source for a plan: a folder or file, the entry of the cache folder with that name, or the name itself.

    Raises: CheckpointError when it is the demo and the demo is not built yet.
    """
    path = resolve(name)
    check_finished(path)
    if path.exists():
        return path
    if name != DEMO:
        return name
    if not (folder := demo.checkpoint_folder(cache_dir())).exists():
        raise CheckpointError(DEMO_IS_NOT_BUILT)
    return folder


def ensure_store(
    source: str | Path,
    *,
    codec: str | None,
    dense_codec: str,
    revision: str | None,
    token: str | None,
    follow_links: bool = False,
    progress: Progress = silent,
    on_notice: Callable[[str], None] = log_notice,
) -> Path:
    """The store of `source`; a checkpoint is converted into the user's cache folder first, once per codec.

    codec: None takes the default of `quantize`. on_notice: receives notices of a conversion.

    Raises: CheckpointError when `source` cannot be loaded; the errors of `quantize`.
    """
    check_model(source, revision)
    source, revision = hub_name(source, revision)
    if split_gguf_name(str(source)) is not None and not resolve(source).exists():
        keeps_bits = codec is None
        source, _ = download_gguf(str(source), revision=revision, token=token, keeps_bits=keeps_bits, progress=progress)
        revision = None
    folder = resolve(source)
    if is_store(folder):
        return folder
    if is_gguf(folder) and codec is None:
        return ensure_view(folder, str(source))
    if folder.is_file():
        raise CheckpointError(file_advice(folder))
    check_finished(folder)
    if source == DEMO and not folder.exists():
        folder = demo.checkpoint(progress=progress)
    is_local = folder.exists()
    if folder.is_dir():
        check_folder(folder, follow_links=follow_links)  # also before an existing conversion is used
    identity = folder if is_local else Path(str(source))
    stores = cache_dir() / STORES
    for name in (codec,) if codec else (DEFAULT, MXFP4):
        if is_store(store := stores / _cache_name(identity, name, dense_codec, revision)):
            return store
    if codec is None:
        origin = folder if is_local else resolve_source(source, revision=revision, token=token).folder
        codec = default_codec(origin)
    return quantize(
        folder if is_local else str(source),
        stores / _cache_name(identity, codec, dense_codec, revision),
        codec=codec,
        dense_codec=dense_codec,
        revision=revision,
        token=token,
        follow_links=follow_links,
        progress=progress,
        on_notice=on_notice,
    )


def ensure_view(file: Path, source: str) -> Path:
    """The folder of the cache that stands for a GGUF file, made from its metadata first; the file stays as it is.

    Raises: CheckpointError naming what cannot be used as it lies.
    """
    paths = parts_beside(file.absolute())
    states = [(str(path), path.stat()) for path in paths]
    identity = "\n".join(f"{path} {status.st_size} {status.st_mtime_ns}" for path, status in states)
    digest = hashlib.sha256(f"{identity}\n{FORMAT_VERSION}".encode()).hexdigest()[:12]
    folder = cache_dir() / STORES / f"{model_name(file)}-{GGUF}-{digest}"
    return folder if is_store(folder) else make_view(paths, folder, source)


def _cache_name(source: Path, codec: str, dense_codec: str, revision: str | None) -> str:
    """One name per source, its current state and the codecs, so that a changed checkpoint is converted again."""
    identity = [str(source), revision or ""]
    if source.is_dir():
        weights = sorted(path for pattern in ("*.safetensors", "*.gguf") for path in source.glob(pattern))
        files = [*weights, source / CONFIG_NAME, *_deciding(source, {path.name for path in weights})]
        stats = [(file.name, file.stat()) for file in files if file.exists()]
        identity = [str(source.resolve()), *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)]
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:12]
    return f"{source.name}-{codec}-{dense_codec}-{digest}"


def _deciding(folder: Path, weights: set[str]) -> list[Path]:
    """Files that affect the choice of weights beyond those directly in the folder: the index, and shards."""
    try:
        chosen = choose_weights(folder)
    except CheckpointError:
        return []
    if set(chosen.names) == weights:
        return []
    index = [folder / chosen.index] if chosen.index else []
    return index + [folder / name for name in chosen.names if name not in weights]
