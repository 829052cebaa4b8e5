"""Symbolic links in a model folder: followed only if the owner of their target may have placed them.

A folder from an archive may contain links to any file, which would be read, and small files would be copied into
the store.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from offload_moe.checkpoint.weight_files import safe_path
from offload_moe.errors import CheckpointError

ROOT_USER = 0
MAX_LINKS = 64


def check_links(folder: Path, names: Iterable[str], *, follow_links: bool = False) -> None:
    """Check the symbolic links of a folder.

    A link out of the folder is followed if it and its target belong to one user, who is the current one or the owner
    of the folder, or if follow_links is set. In the hub's cache, `blobs` beside `snapshots` counts as inside.

    Raises: CheckpointError for a link that is broken or may not be followed.
    """
    root = folder.resolve()
    for name in names:
        path = safe_path(folder, name)
        try:
            real = Path(os.path.realpath(path, strict=True))
        except OSError as error:
            if path.is_symlink() or any(parent.is_symlink() for parent in _below(folder, path)):
                raise CheckpointError(_dangling(path, error)) from error
            continue  # a missing or unreadable file is reported when it is read
        if not (follow_links or _is_inside(root, real) or _is_trusted(root, name, real)):
            raise CheckpointError(
                f"{path} is a link to {real}, which belongs to another user than the link or the folder. Use "
                "--follow-links (in Python: follow_links=True) if you trust it, or copy the file into the folder."
            )


def _is_inside(root: Path, real: Path) -> bool:
    blobs = root.parent.parent / "blobs"
    is_snapshot = root.parent.name == "snapshots" and not blobs.is_symlink()
    return real.is_relative_to(root) or (is_snapshot and real.is_relative_to(blobs))


def _is_trusted(root: Path, name: str, real: Path) -> bool:
    owner = _owner(real)
    if owner not in (_user(), _owner(root)):
        return False
    return all(_owner(link) in (owner, ROOT_USER) for link in _links_on_the_way(root, name))


def _links_on_the_way(root: Path, name: str) -> Iterator[Path]:
    """Every link on the path from a folder (itself without links) to a file; the file must exist."""
    at, parts = root, deque(Path(name).parts)
    num_links = 0
    while parts and num_links < MAX_LINKS:
        step = at / parts.popleft()
        if step.name == "..":
            at = at.parent
        elif step.is_symlink():
            yield step
            num_links += 1
            target = step.readlink()
            parts.extendleft(reversed(target.parts))
        else:
            at = step


def _below(folder: Path, path: Path) -> Iterator[Path]:
    return (parent for parent in path.parents if parent != folder and parent.is_relative_to(folder))


def _dangling(path: Path, error: OSError) -> str:
    link = path if path.is_symlink() else path.parent
    return (
        f"{path} leads nowhere: {link.name} is a link to {os.readlink(link)} ({error.strerror}). Bring that back, or "
        "replace the link by the file."
    )


def _owner(path: Path) -> int:
    """The owner of a file, or of a link itself."""
    return path.lstat().st_uid


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0
