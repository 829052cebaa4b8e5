"""One model in GGUF of a hub repository that has many: `ORG/MODEL-GGUF:Q4_K_M`, or a pattern of file names."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath

from offload_moe.checkpoint.gguf_header import fetch_header
from offload_moe.checkpoint.gguf_split import PART
from offload_moe.checkpoint.hub import Repository, fetch_beginning, hub_errors, open_repository
from offload_moe.errors import CheckpointError
from offload_moe.system.names import split_gguf_name

NOT_MODELS = ("mmproj", "imatrix")  # beginnings of names of other files in GGUF
MOST_SHOWN = 12


@dataclass(frozen=True, slots=True)
class HubGguf:
    """One model in GGUF on the hub: the names of its files, in order."""

    name: str
    repository: Repository
    files: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(self.repository.files[file].num_bytes for file in self.files)

    def cached(self) -> Path | None:
        """The first part, where the hub's own cache has all of them."""
        from huggingface_hub import try_to_load_from_cache

        repository = self.repository
        paths = [try_to_load_from_cache(repository.repo_id, file, revision=repository.commit) for file in self.files]
        return Path(str(paths[0])) if all(isinstance(path, str) for path in paths) else None

    def download(self) -> Path:
        """Download the files into the hub's own cache. Returns the first part. Raises: TransferError."""
        from huggingface_hub import snapshot_download

        repository = self.repository
        advice = "Run the same command again to resume."
        with hub_errors(f"Downloading {self.name}", repository.repo_id, repository.commit, advice=advice):
            folder = snapshot_download(
                repository.repo_id, revision=repository.commit, token=repository.token, allow_patterns=[*self.files]
            )
        return Path(folder, self.files[0])

    def fetch_headers(self, folder: Path) -> tuple[Path, ...]:
        """Write files of the same names and lengths, of which only the headers are there; the rest is a hole.

        Raises: CheckpointError for a file that is none in GGUF, TransferError.
        """
        paths = []
        for file in self.files:
            path = folder / PurePosixPath(file).name
            path.write_bytes(self._header(file))
            os.truncate(path, self.repository.files[file].num_bytes)
            paths.append(path)
        return tuple(paths)

    def _header(self, file: str) -> bytes:
        fetch, file_bytes = partial(fetch_beginning, self.repository, file), self.repository.files[file].num_bytes
        return fetch_header(fetch, file_bytes, f"{file} of {self.repository.repo_id}")[1]


def find_gguf(name: str, *, revision: str | None, token: str | None) -> HubGguf:
    """The model that a name as `split_gguf_name` takes it means. Raises: TransferError; CheckpointError for several."""
    found = split_gguf_name(name)
    assert found is not None, name
    repo_id, wanted = found
    repository = open_repository(repo_id, revision=revision, token=token)
    return HubGguf(name, repository, tuple(choose_files(repository.files, wanted, repo_id)))


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
