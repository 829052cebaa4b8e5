"""A GGUF file as the source of a store: on the disk, or on the hub, from where it is downloaded first."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from offload_moe.checkpoint.gguf_hub import download_gguf
from offload_moe.checkpoint.gguf_split import is_gguf, parts_beside
from offload_moe.checkpoint.gguf_view import write_small_files
from offload_moe.checkpoint.source import Source
from offload_moe.system.names import split_gguf_name
from offload_moe.system.paths import user_path
from offload_moe.system.progress import Progress, silent


def local_gguf(
    source: str | Path, *, revision: str | None, token: str | None, progress: Progress = silent
) -> tuple[tuple[Path, ...], str | None]:
    """The parts of a source that is a GGUF file, none of another source; and the commit that they are of.

    Raises: CheckpointError for parts that are missing, and what `download_gguf` raises.
    """
    commit = None
    if split_gguf_name(str(source)) is not None and not Path(source).exists():
        progress(f"Downloading {source}")
        source, commit = download_gguf(str(source), revision=revision, token=token)
    path = user_path(source)
    return parts_beside(path.absolute()) if is_gguf(path) else (), commit


def small_files_of(parts: tuple[Path, ...], name: str, commit: str | None, stack: ExitStack) -> Source:
    """A temporary folder with the config and the tokenizer of GGUF files, until the stack is closed."""
    folder = Path(stack.enter_context(TemporaryDirectory()))
    write_small_files(parts, folder)
    return Source(folder=folder, name=name, revision=commit)
