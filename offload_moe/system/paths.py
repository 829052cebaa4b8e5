"""The folders of this program's files."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

CACHE_VARIABLE = "OFFLOAD_MOE_CACHE"
CONFIG_NAME = "config.json"  # of a model
MANIFEST_NAME = "store.json"  # of a store


def cache_dir(environ: Mapping[str, str] | None = None, platform: str | None = None) -> Path:
    """The folder for files that can be rebuilt; it may not exist yet.

    `OFFLOAD_MOE_CACHE` wins; then the platform's convention: `XDG_CACHE_HOME` or `~/.cache`, `~/Library/Caches` on
    macOS, `%LOCALAPPDATA%` on Windows.
    """
    environ = os.environ if environ is None else environ
    platform = sys.platform if platform is None else platform
    if chosen := environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    if platform == "win32":
        local = environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "offload_moe" / "cache"
    if platform == "darwin":
        return Path.home() / "Library" / "Caches" / "offload_moe"
    base = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "offload_moe"


def state_dir(environ: Mapping[str, str] | None = None, platform: str | None = None) -> Path:
    """The folder for files that cannot be rebuilt, such as the chat history; it may not exist yet.

    On Linux `XDG_STATE_HOME` or `~/.local/state`; with `OFFLOAD_MOE_CACHE`, and elsewhere, the folder of the cache.
    """
    environ = os.environ if environ is None else environ
    platform = sys.platform if platform is None else platform
    if environ.get(CACHE_VARIABLE) or platform in ("win32", "darwin"):
        return cache_dir(environ, platform)
    base = environ.get("XDG_STATE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "offload_moe"


def file_advice(path: Path) -> str:
    """The advice for a file in place of a model's folder."""
    folder = path.absolute().parent
    if path.suffix.lower() == ".gguf":
        return (
            f"{path} is a GGUF file, not a store's folder. `offload-moe chat`, `run`, `serve`, `plan`, `info` and "
            "`quantize` take it as it is."
        )
    what = "the manifest of a store, whose folder is" if path.name == MANIFEST_NAME else "a file, not a model folder:"
    return f"{path} is {what} {folder}. Name the folder, which holds config.json and tokenizer beside the weights."
