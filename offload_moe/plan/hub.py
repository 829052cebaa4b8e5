"""A hub repository's config and the size of its weights, without the weights."""

from fnmatch import fnmatch
from pathlib import Path

from offload_moe.checkpoint.hub import hub_errors
from offload_moe.checkpoint.source import IGNORED_PATTERNS, WEIGHT_PATTERNS
from offload_moe.errors import CheckpointError


def fetch_config(repo_id: str, *, revision: str | None, token: str | None) -> tuple[Path, tuple[int, ...] | None]:
    """The folder that holds `config.json`, and the bytes of each weight file that a download would fetch.

    Raises:
        CheckpointError: the repository has no config.
        TransferError: it is not there, not open to this token, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with hub_errors(f"Asking the hub for {repo_id}", repo_id, revision):
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
        try:
            config = hf_hub_download(repo_id, "config.json", revision=info.sha, token=token)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise CheckpointError(f"{repo_id} is not a transformers model: it has no config.json.") from error
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or () if _is_weights(sibling.rfilename)}
    known = tuple(size for size in sizes.values() if size is not None)
    return Path(config).parent, known if known and len(known) == len(sizes) else None


def _is_weights(name: str) -> bool:
    """Whether a download takes this file; `/` is matched by `*`, as the hub client does."""
    return any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS) and not any(
        fnmatch(name, pattern) for pattern in IGNORED_PATTERNS
    )
