"""Where a checkpoint comes from: a local folder, or the hub, of which only the needed files are fetched."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from offload_moe.checkpoint.download import NOTE_NAME, Download, OnDownload
from offload_moe.checkpoint.hub import hub_errors
from offload_moe.checkpoint.shards import safe_path
from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.names import check_source, hub_name
from offload_moe.names import looks_like_hub_id as looks_like_hub_id

# What a model folder needs beside its weights: config, generation config, tokenizer, chat templates.
METADATA_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")
WEIGHT_PATTERNS = ("*.safetensors",)
# The same weights again in other shapes: originals in subfolders, consolidated files.
IGNORED_PATTERNS = ("consolidated*", "*/*.safetensors", "*/*.json", "*/*.model", "*/*.txt", "*/*.tiktoken")

NOT_KEPT = {"store.json", NOTE_NAME, "LICENSE.txt", "requirements.txt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint folder, what to call it, and the hub commit it is a snapshot of."""

    folder: Path
    name: str
    revision: str | None = None


def resolve_source(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Source:
    """The folder of a checkpoint, downloaded into the hub's own cache if it must be.

    Raises:
        CheckpointError: neither a folder nor a hub id.
        TransferError: the download failed.
    """
    source, revision = hub_name(source, revision)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Source(folder=folder, name=folder.resolve().name, revision=revision)
    if folder.exists():
        raise CheckpointError(
            f"{source} is a file, not a model folder. Name the folder that holds config.json and tokenizer beside it."
        )
    check_source(source)
    snapshot = _download(str(source), revision, token)
    return Source(folder=snapshot, name=str(source), revision=snapshot.name)


def metadata_files(folder: Path) -> dict[str, Path]:
    """The small files of a model folder that its store keeps, by name relative to the folder, sorted."""
    found = {str(p.relative_to(folder)) for pattern in METADATA_PATTERNS for p in folder.glob(pattern) if p.is_file()}
    kept = sorted(name for name in found if not name.endswith(".index.json") and name not in NOT_KEPT)
    return {name: safe_path(folder, name) for name in kept}


def open_download(
    repo_id: str | Path, folder: Path, *, revision: str | None, token: str | None, on_download: OnDownload
) -> Download:
    """A hub repository of which `folder` holds everything but the shards, which come when they are read.

    Raises: ConfigError for anything but a hub id, and what `Download` raises.
    """
    repo_id, revision = hub_name(repo_id, revision)
    if Path(repo_id).expanduser().exists() or not looks_like_hub_id(str(repo_id)):
        raise ConfigError(
            f"{repo_id} is no hub id. Only shards that were downloaded for the conversion are deleted: convert a "
            "folder without --delete-source-shards."
        )
    download = Download(folder, str(repo_id), revision=revision, token=token, on_download=on_download)
    try:
        download.fetch_metadata(wanted_files(download.repository.files, METADATA_PATTERNS))
        download.fetch_headers()
    except BaseException:
        download.close()
        raise
    return download


def wanted_files(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    """Those files of a repository that a download takes, by the rules of the hub client."""
    from huggingface_hub.utils import filter_repo_objects

    return sorted(filter_repo_objects(names, allow_patterns=list(patterns), ignore_patterns=list(IGNORED_PATTERNS)))


def _download(repo_id: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download

    advice = "Run the same command again to resume."
    with hub_errors(f"Downloading {repo_id}", repo_id, revision, advice=advice):
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=[*METADATA_PATTERNS, *WEIGHT_PATTERNS],
            ignore_patterns=list(IGNORED_PATTERNS),
        )
    return Path(snapshot)
