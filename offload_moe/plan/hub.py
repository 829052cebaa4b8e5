"""A hub repository's config and the size of its weights, without the weights."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from offload_moe.checkpoint.hub import hub_errors
from offload_moe.checkpoint.source import IGNORED_PATTERNS
from offload_moe.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME, choose_weights, refuse_adapter
from offload_moe.errors import CheckpointError
from offload_moe.system.paths import CONFIG_NAME


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """folder: with the config. sizes: bytes of each weight file that a download would fetch, None if unknown.

    tensor_names: of a safetensors index; empty if there is none.
    """

    folder: Path
    sizes: tuple[int, ...] | None
    tensor_names: Collection[str]


def fetch_config(repo_id: str, *, revision: str | None, token: str | None) -> HubModel:
    """The config, and the index if there is one.

    Raises:
        CheckpointError: the repository has no config, or an adapter.
        TransferError: the repository does not exist or is not open to this token, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with hub_errors(f"Looking up {repo_id} on the hub", repo_id, revision):
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
        refuse_adapter(repo_id, sizes)

        def fetch(name: str) -> Path:
            return Path(hf_hub_download(repo_id, name, revision=info.sha, token=token))

        try:
            folder = fetch(CONFIG_NAME).parent
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise CheckpointError(f"{repo_id} is not a transformers model: it has no config.json.") from error
        names, tensor_names = _chosen(folder, sizes, fetch)
    known = tuple(size for name in names if (size := sizes.get(name)) is not None)
    return HubModel(
        folder=folder, sizes=known if known and len(known) == len(names) else None, tensor_names=tensor_names
    )


def _chosen(
    folder: Path, present: Mapping[str, int | None], fetch: Callable[[str], Path]
) -> tuple[Collection[str], Collection[str]]:
    """The weight files of a download, and the tensor names of its index if there is one."""
    if SINGLE_NAME not in present and INDEX_NAME in present:
        fetch(INDEX_NAME)
    try:
        weights = choose_weights(folder, present.keys())
    except CheckpointError:  # not convertible; the size is that of all files that look like weights
        return [name for name in present if _is_weights(name)], ()
    return weights.names, weights.promised.keys()


def _is_weights(name: str) -> bool:
    """Match patterns in which `*` also matches `/`, as in the hub client."""
    return name.endswith(".safetensors") and not any(fnmatch(name, pattern) for pattern in IGNORED_PATTERNS)
