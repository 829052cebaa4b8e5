"""The source of a checkpoint: a local folder, or the hub, from which only the needed files are downloaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from offload_moe.checkpoint.download import NOTE_NAME, Download
from offload_moe.checkpoint.hub import hub_errors
from offload_moe.checkpoint.links import check_links
from offload_moe.checkpoint.weight_files import (
    INDEX_NAME,
    SINGLE_NAME,
    WEIGHT_NAMES,
    choose_weights,
    file_names,
    refuse_adapter,
)
from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.system.names import check_source, hub_name
from offload_moe.system.names import looks_like_hub_id as looks_like_hub_id
from offload_moe.system.paths import MANIFEST_NAME, file_advice, user_path
from offload_moe.system.progress import Progress

# Files of a model folder beside its weights: config, generation config, tokenizer, chat templates.
METADATA_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")
# Copies of the weights in other layouts: originals in subfolders, consolidated files.
IGNORED_PATTERNS = ("consolidated*", "*/*.safetensors", "*/*.json", "*/*.model", "*/*.txt", "*/*.tiktoken")

NOT_KEPT = {MANIFEST_NAME, NOTE_NAME, "LICENSE.txt", "requirements.txt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint folder, its name, and its hub commit."""

    folder: Path
    name: str
    revision: str | None = None


def resolve_source(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    follow_links: bool = False,
    adapter: Path | None = None,
) -> Source:
    """The folder of a checkpoint, downloaded into the hub's own cache if necessary.

    follow_links: also follow links to files of other users, see `check_links`. adapter: the folder of one that is
        merged, which may be this one.

    Raises:
    CheckpointError: neither a folder nor a hub id, or with an adapter or with links that are not followed.
        TransferError: the download failed.
    """
    source, revision = hub_name(source, revision)
    folder = user_path(source)
    if folder.is_dir():
        is_merged = adapter is not None and adapter.resolve() == folder.resolve()
        check_folder(folder, follow_links=follow_links, merges_adapter=is_merged)
        return Source(folder=folder, name=folder.resolve().name, revision=revision)
    if folder.exists():
        raise CheckpointError(file_advice(folder))
    check_source(source)
    snapshot = _download(str(source), revision, token)
    return Source(folder=snapshot, name=str(source), revision=snapshot.name)


def check_folder(folder: Path, *, follow_links: bool = False, merges_adapter: bool = False) -> None:
    """Run the checks that need no open file.

    Raises: CheckpointError for an adapter that is not merged, and for links that are not followed.
    """
    if not merges_adapter:
        refuse_adapter(folder, file_names(folder))
    small = [path.relative_to(folder).as_posix() for pattern in METADATA_PATTERNS for path in folder.glob(pattern)]
    check_links(folder, small, follow_links=follow_links)
    try:
        weights: Iterable[str] = choose_weights(folder).names
    except CheckpointError:  # reported when they are read, unless it is for a link
        weights = [path.name for pattern in WEIGHT_NAMES for path in folder.glob(pattern)]
    check_links(folder, weights, follow_links=follow_links)


def metadata_files(folder: Path) -> dict[str, Path]:
    """The small files of a model folder that are copied to its store, by name relative to the folder, sorted."""
    paths = {path for pattern in METADATA_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {n: names[n] for n in sorted(names) if not n.endswith(".index.json") and n not in NOT_KEPT}


def open_download(
    repo_id: str | Path, folder: Path, *, revision: str | None, token: str | None, progress: Progress
) -> Download:
    """A hub repository of which `folder` holds everything but the shards, which are downloaded when they are read.

    Raises: ConfigError for anything but a hub id, and what `Download` raises.
    """
    repo_id, revision = hub_name(repo_id, revision)
    if user_path(repo_id).exists() or not looks_like_hub_id(str(repo_id)):
        raise ConfigError(
            f"{repo_id} is no hub id. Only shards that were downloaded for the conversion are deleted: convert a "
            "folder without --delete-source-shards."
        )
    download = Download(folder, str(repo_id), revision=revision, token=token, progress=progress)
    try:
        refuse_adapter(str(repo_id), download.repository.files)
        download.fetch_metadata(wanted_files(download.repository.files, METADATA_PATTERNS))
        download.fetch_headers()
    except BaseException:
        download.close()
        raise
    return download


def wanted_files(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    """The files of a repository that a download includes, by the rules of the hub client."""
    from huggingface_hub.utils import filter_repo_objects

    return sorted(filter_repo_objects(names, allow_patterns=list(patterns), ignore_patterns=list(IGNORED_PATTERNS)))


def _download(repo_id: str, revision: str | None, token: str | None) -> Path:
    """The small files, then the weights that transformers would load: a single file, or else those in the index."""
    from huggingface_hub import snapshot_download

    def fetch(revision: str | None, names: Iterable[str], ignored: Iterable[str] = ()) -> Path:
        with hub_errors(f"Downloading {repo_id}", repo_id, revision, advice="Run the same command again to resume."):
            return Path(
                snapshot_download(
                    repo_id,
                    revision=revision,
                    token=token,
                    allow_patterns=list(names),
                    ignore_patterns=list(ignored) or None,
                )
            )

    snapshot = fetch(revision, METADATA_PATTERNS, IGNORED_PATTERNS)
    present = file_names(snapshot)
    refuse_adapter(repo_id, present)
    first = choose_weights(snapshot, {*present, SINGLE_NAME}).names
    fetch(snapshot.name, first)
    if not (snapshot / first[0]).is_file() and INDEX_NAME in present:
        fetch(snapshot.name, choose_weights(snapshot).names)
    return snapshot
