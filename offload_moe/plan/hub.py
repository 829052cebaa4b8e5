"""A hub repository's config and the size of its weights, without the weights."""

from fnmatch import fnmatch
from pathlib import Path

from offload_moe.checkpoint.source import IGNORED_PATTERNS, WEIGHT_PATTERNS
from offload_moe.errors import CheckpointError, TransferError


def fetch_config(repo_id: str, *, revision: str | None, token: str | None) -> tuple[Path, int | None]:
    """The folder that holds `config.json`, and the bytes of the weight files that a download would fetch.

    Raises:
        CheckpointError: the repository has no config.
        TransferError: it is not there, not open to this token, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
        config = hf_hub_download(repo_id, "config.json", revision=info.sha, token=token)
    except GatedRepoError as error:
        raise TransferError(f"{repo_id} is gated: accept its terms on the hub and pass a token.") from error
    except RevisionNotFoundError as error:
        raise TransferError(f"{repo_id} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise TransferError(f"{repo_id} is not on the hub, or is private and needs a token.") from error
    except (
        EntryNotFoundError,
        OSError,
        HFValidationError,
    ) as error:  # every HTTP error of the hub client is an OSError
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise CheckpointError(f"{repo_id} is not a transformers model: it has no config.json.") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TransferError(f"Asking the hub for {repo_id} failed: {reason}") from error
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or () if _is_weights(sibling.rfilename)}
    known = [size for size in sizes.values() if size is not None]
    return Path(config).parent, sum(known) if known and len(known) == len(sizes) else None


def _is_weights(name: str) -> bool:
    """Whether a download takes this file; `/` is matched by `*`, as the hub client does."""
    return any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS) and not any(
        fnmatch(name, pattern) for pattern in IGNORED_PATTERNS
    )
