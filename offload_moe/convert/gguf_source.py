"""A GGUF file as the source of a store: on the disk, or on the hub, from where it is downloaded first."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from offload_moe.checkpoint.gguf_hub import HubGguf, find_gguf
from offload_moe.checkpoint.gguf_split import is_gguf, parts_beside
from offload_moe.checkpoint.gguf_view import write_small_files
from offload_moe.checkpoint.source import Source
from offload_moe.store.in_place import make_view
from offload_moe.system.names import split_gguf_name
from offload_moe.system.paths import user_path
from offload_moe.system.progress import Progress, silent


@contextmanager
def view_of_headers(found: HubGguf) -> Iterator[Path]:
    """A folder that stands for a model of the hub of which only the headers are downloaded. Nothing else may be read.

    Raises: CheckpointError naming what cannot be used as it lies, TransferError.
    """
    with TemporaryDirectory() as folder:
        yield make_view(found.fetch_headers(Path(folder)), Path(folder, "view"), found.name, has_data=False)


def download_gguf(
    name: str, *, revision: str | None, token: str | None, keeps_bits: bool, progress: Progress = silent
) -> tuple[Path, str]:
    """The first part of a model of the hub, in the hub's own cache, and its commit.

    keeps_bits: it is used as it lies, which its header shows before the rest is downloaded.

    Raises: CheckpointError, TransferError.
    """
    found = find_gguf(name, revision=revision, token=token)
    path = found.cached()
    if path is None:
        progress(f"Downloading {name}")
        if keeps_bits:
            with view_of_headers(found):
                pass
        path = found.download()
    return path, found.repository.commit


def local_gguf(
    source: str | Path, *, revision: str | None, token: str | None, keeps_bits: bool, progress: Progress = silent
) -> tuple[tuple[Path, ...], str | None]:
    """The parts of a source that is a GGUF file, none of another source; and the commit that they are of.

    Raises: CheckpointError for parts that are missing, and what `download_gguf` raises.
    """
    commit = None
    if _is_on_hub(source):
        source, commit = download_gguf(
            str(source), revision=revision, token=token, keeps_bits=keeps_bits, progress=progress
        )
    path = user_path(source)
    return parts_beside(path.absolute()) if is_gguf(path) else (), commit


def names_gguf(source: str | Path) -> bool:
    """Whether a source is a GGUF file, on the disk or the hub."""
    return is_gguf(user_path(source)) or _is_on_hub(source)


def _is_on_hub(source: str | Path) -> bool:
    return split_gguf_name(str(source)) is not None and not user_path(source).exists()


def small_files_of(parts: tuple[Path, ...], name: str, commit: str | None, stack: ExitStack) -> Source:
    """A temporary folder with the config and the tokenizer of GGUF files, until the stack is closed."""
    folder = Path(stack.enter_context(TemporaryDirectory()))
    write_small_files(parts, folder)
    return Source(folder=folder, name=name, revision=commit)
