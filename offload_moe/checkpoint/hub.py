"""Access to the hub: the list of a repository's files, one file, or the beginning of one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_moe.errors import BudgetError, CheckpointError, TransferError
from offload_moe.system.folders import delete_file
from offload_moe.system.full_disk import full_disk_named, is_full
from offload_moe.system.locks import NO_LOCKS
from offload_moe.system.open_files import replace_file

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from huggingface_hub.utils import tqdm

PARTIAL = ".partial"  # suffix of an incomplete file

OnBytes = Callable[[int], None]  # receives the number of downloaded bytes of a file


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """sha256: of the content, if the hub keeps the file outside git."""

    num_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """One commit of a model repository, and every file in it. token: None takes the token of the login."""

    repo_id: str
    commit: str
    files: dict[str, HubFile]
    token: str | None

    def url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo_id, name, revision=self.commit)

    def headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return {**build_hf_headers(token=self.token), "Accept-Encoding": "identity"}


@contextmanager
def hub_errors(doing: str, repo_id: str, revision: str | None, *, advice: str = "") -> Iterator[None]:
    """Translate the errors of the hub client. doing: the beginning of a sentence, such as "Downloading org/model".

    Raises: TransferError; BudgetError where the disk of the hub's cache is full.
    """
    from httpx2 import HTTPError
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as error:
        advice = "Accept its terms on its page, then `hf auth login`, or set HF_TOKEN."
        raise TransferError(f"{repo_id} is gated. {advice}") from error
    except RevisionNotFoundError as error:
        raise TransferError(f"{repo_id} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise TransferError(f"{repo_id} is not on the hub, or is private and needs a token.") from error
    except (OSError, HTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, OSError) and is_full(error):
            raise full_cache(doing) from error
        if isinstance(error, OSError) and error.errno in NO_LOCKS:
            advice = "The hub's cache is on a disk without file locks: name a folder on another one with HF_HOME."
        raise TransferError(f"{doing} failed: {reason.rstrip('.')}. {advice}".rstrip()) from error


def full_cache(doing: str) -> BudgetError:
    """The error where the disk of the hub's own cache is full."""
    from huggingface_hub import constants

    return BudgetError(
        f"{doing} failed: the disk of the hub's cache, {constants.HF_HUB_CACHE}, is full. Free some space, or name a "
        "folder on another disk with HF_HOME, and run the same command again to resume."
    )


def open_repository(repo_id: str, *, revision: str | None, token: str | None) -> Repository:
    """Look up commit and files of a revision on the hub. Raises: TransferError."""
    from huggingface_hub import HfApi

    with hub_errors(f"Looking up {repo_id} on the hub", repo_id, revision):
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    files = {
        sibling.rfilename: HubFile(num_bytes=sibling.size, sha256=sibling.lfs.sha256 if sibling.lfs else None)
        for sibling in info.siblings or ()
        if sibling.size is not None
    }
    if info.sha is None:
        raise TransferError(f"The hub names no commit for {repo_id}.")
    return Repository(repo_id=repo_id, commit=info.sha, files=files, token=token)


def fetch_beginning(repository: Repository, name: str, num_bytes: int) -> bytes:
    """The first bytes of a file, or all of a shorter one. Raises: TransferError."""
    from huggingface_hub.file_download import http_get

    beginning = _Beginning(num_bytes)
    doing = f"Reading the header of {name} from {repository.repo_id}"
    with hub_errors(doing, repository.repo_id, repository.commit), suppress(_Enough):
        http_get(
            repository.url(name),
            beginning,
            headers={**repository.headers(), "Range": f"bytes=0-{num_bytes - 1}"},
            tqdm_class=_reporting(lambda done: None, 0),
        )
    return beginning.getvalue()[:num_bytes]


class _Enough(Exception):
    """The beginning is complete; a server without support for ranges would continue."""


class _Beginning(BytesIO):
    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self._num_bytes = num_bytes

    def write(self, data: "ReadableBuffer") -> int:
        count = super().write(data)
        if self.tell() >= self._num_bytes:
            raise _Enough
        return count


def fetch(repository: Repository, name: str, target: Path, on_bytes: OnBytes) -> None:
    """Download a file, resuming an earlier attempt of any process; `target` appears when it is complete.

    A commit never changes, so the part of an earlier attempt fits; a resumed file is nevertheless compared with the
    hub's hash.

    Raises: TransferError; CheckpointError when a resumed file does not match the hub's hash; BudgetError for a
        full disk.
    """
    from huggingface_hub.file_download import http_get

    file, partial = repository.files[name], target.with_name(target.name + PARTIAL)
    present = partial.stat().st_size if partial.exists() else 0
    if present > file.num_bytes:
        delete_file(partial)
        present = 0
    advice = "Run the same command again to resume."
    with (
        hub_errors(f"Downloading {name} of {repository.repo_id}", repository.repo_id, repository.commit, advice=advice),
        full_disk_named(target.parent, file.num_bytes - present, f"Free some space. {advice}"),
        partial.open("ab") as stream,
    ):
        http_get(
            repository.url(name),
            stream,
            resume_size=present,
            headers=repository.headers(),
            expected_size=file.num_bytes,
            tqdm_class=_reporting(on_bytes, present),
        )
        stream.flush()
        os.fsync(stream.fileno())
    if present and file.sha256 is not None and _sha256(partial) != file.sha256:
        delete_file(partial)
        raise CheckpointError(f"{target} was damaged while it was downloaded. Run the same command again.")
    replace_file(partial, target)


def _reporting(on_bytes: OnBytes, present: int) -> "type[tqdm]":
    """A progress bar for the hub client that only forwards the progress."""
    from huggingface_hub.utils import tqdm

    class Reporting(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            self._done = present
            super().__init__(*arguments, **{**settings, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self._done += int(n or 0)
            on_bytes(self._done)

    return Reporting


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
