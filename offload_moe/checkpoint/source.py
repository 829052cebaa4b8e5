"""Where a checkpoint comes from: a local folder, or the hub, of which only the needed files are fetched."""

import re
from dataclasses import dataclass
from pathlib import Path

from offload_moe.checkpoint.shards import safe_path
from offload_moe.errors import CheckpointError, TransferError

# What a model folder needs beside its weights: config, generation config, tokenizer, chat templates.
METADATA_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")
WEIGHT_PATTERNS = ("*.safetensors",)
# The same weights again in other shapes: originals in subfolders, consolidated files.
IGNORED_PATTERNS = ("consolidated*", "*/*.safetensors", "*/*.json", "*/*.model", "*/*.txt", "*/*.tiktoken")

NOT_KEPT = {"store.json", "LICENSE.txt", "requirements.txt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint folder, what to call it, and the hub commit it is a snapshot of."""

    folder: Path
    name: str
    revision: str | None = None


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` may be a hub id: `organisation/model`."""
    return re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", text) is not None and ".." not in text


def resolve_source(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Source:
    """The folder of a checkpoint, downloaded into the hub's own cache if it must be.

    Raises:
        CheckpointError: neither a folder nor a hub id.
        TransferError: the download failed.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Source(folder=folder, name=folder.resolve().name, revision=revision)
    if folder.exists():
        raise CheckpointError(
            f"{source} is a file, not a model folder. Name the folder that holds config.json and tokenizer beside it."
        )
    if not looks_like_hub_id(str(source)):
        raise CheckpointError(f"{source} is neither a folder nor a hub id like organisation/model. Check the path.")
    snapshot = _download(str(source), revision, token)
    return Source(folder=snapshot, name=str(source), revision=snapshot.name)


def metadata_files(folder: Path) -> dict[str, Path]:
    """The small files of a model folder that its store keeps, by name relative to the folder, sorted."""
    found = {str(p.relative_to(folder)) for pattern in METADATA_PATTERNS for p in folder.glob(pattern) if p.is_file()}
    kept = sorted(name for name in found if not name.endswith(".index.json") and name not in NOT_KEPT)
    return {name: safe_path(folder, name) for name in kept}


def _download(repo_id: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=[*METADATA_PATTERNS, *WEIGHT_PATTERNS],
            ignore_patterns=list(IGNORED_PATTERNS),
        )
    except GatedRepoError as error:
        raise TransferError(f"{repo_id} is gated: accept its terms on the hub and pass a token.") from error
    except RevisionNotFoundError as error:
        raise TransferError(f"{repo_id} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise TransferError(f"{repo_id} is not on the hub, or is private and needs a token.") from error
    except (OSError, HFValidationError) as error:  # every HTTP error of the hub client is an OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TransferError(f"Downloading {repo_id} failed: {reason} Run the same command again to resume.") from error
    return Path(snapshot)
