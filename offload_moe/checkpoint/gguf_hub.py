"""One model in GGUF of a hub repository that has many: `ORG/MODEL-GGUF:Q4_K_M`, or a pattern of file names."""

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from offload_moe.checkpoint.gguf_split import PART
from offload_moe.checkpoint.hub import hub_errors, open_repository
from offload_moe.errors import CheckpointError
from offload_moe.system.names import split_gguf_name

NOT_MODELS = ("mmproj", "imatrix")  # beginnings of names of other files in GGUF
MOST_SHOWN = 12


def download_gguf(name: str, *, revision: str | None, token: str | None) -> tuple[Path, str]:
    """Download the files of one model into the hub's own cache. Returns the first part, and the commit.

    name: as `split_gguf_name` takes it.

    Raises:
        CheckpointError: no model of the repository, or several, are meant.
        TransferError: the download failed.
    """
    from huggingface_hub import snapshot_download

    found = split_gguf_name(name)
    assert found is not None, name
    repo_id, wanted = found
    repository = open_repository(repo_id, revision=revision, token=token)
    files = choose_files(repository.files, wanted, repo_id)
    advice = "Run the same command again to resume."
    with hub_errors(f"Downloading {name}", repo_id, revision, advice=advice):
        folder = snapshot_download(repo_id, revision=repository.commit, token=token, allow_patterns=files)
    return Path(folder, files[0]), repository.commit


def choose_files(names: Iterable[str], wanted: str, repo_id: str) -> list[str]:
    """The files of the one model that is meant: by a part of its name such as Q4_K_M, or by a pattern.

    Raises: CheckpointError with the names that there are.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        base = PurePosixPath(name).name
        if base.endswith(".gguf") and not base.lower().startswith(NOT_MODELS):
            part = PART.fullmatch(base)
            models.setdefault(f"{PurePosixPath(name).parent}/{part['model'] if part else base}", []).append(name)
    chosen = [files for files in models.values() if _is_meant(files[0], wanted)]
    if len(chosen) == 1:
        return chosen[0]
    shown = [files[0] for files in chosen or models.values()]
    more = f" and {len(shown) - MOST_SHOWN} more" if len(shown) > MOST_SHOWN else ""
    what = f"{len(chosen)} models in GGUF that {wanted} could mean" if chosen else f"no model in GGUF named {wanted}"
    listed = f": {', '.join(shown[:MOST_SHOWN])}{more}" if shown else ""
    raise CheckpointError(f"{repo_id} has {what}{listed}. Write a part of one name, or a pattern, behind the colon.")


def _is_meant(name: str, wanted: str) -> bool:
    if any(character in wanted for character in "*?["):
        return fnmatch(name, wanted) or fnmatch(PurePosixPath(name).name, wanted)
    return re.search(rf"(?:^|[-_./]){re.escape(wanted)}(?:[-./]|$)", name, re.IGNORECASE) is not None
