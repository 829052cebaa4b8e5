"""The folders of this program's files."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from offload_moe.errors import ConfigError

CACHE_VARIABLE = "OFFLOAD_MOE_CACHE"
CONFIG_VARIABLE = "OFFLOAD_MOE_CONFIG"
CONFIG_NAME = "config.json"  # of a model
MANIFEST_NAME = "store.json"  # of a store


def cache_dir(environ: Mapping[str, str] | None = None, platform: str | None = None) -> Path:
    """The folder for files that can be rebuilt; it may not exist yet.

    `OFFLOAD_MOE_CACHE` wins; then the platform's convention: `XDG_CACHE_HOME` or `~/.cache`, `~/Library/Caches` on
    macOS, `%LOCALAPPDATA%` on Windows.

    Raises: ConfigError where there is no home folder.
    """
    environ = os.environ if environ is None else environ
    platform = sys.platform if platform is None else platform
    if chosen := environ.get(CACHE_VARIABLE):
        return user_path(chosen)
    if platform == "win32":
        local = environ.get("LOCALAPPDATA")
        return (Path(local) if local else _home() / "AppData" / "Local") / "offload_moe" / "cache"
    if platform == "darwin":
        return _home() / "Library" / "Caches" / "offload_moe"
    base = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else _home() / ".cache") / "offload_moe"


def state_dir(environ: Mapping[str, str] | None = None, platform: str | None = None) -> Path:
    """The folder for files that cannot be rebuilt, such as the chat history; it may not exist yet.

    On Linux `XDG_STATE_HOME` or `~/.local/state`; with `OFFLOAD_MOE_CACHE`, and elsewhere, the folder of the cache.

    Raises: ConfigError where there is no home folder.
    """
    environ = os.environ if environ is None else environ
    platform = sys.platform if platform is None else platform
    if environ.get(CACHE_VARIABLE) or platform in ("win32", "darwin"):
        return cache_dir(environ, platform)
    base = environ.get("XDG_STATE_HOME", "")
    return (Path(base) if os.path.isabs(base) else _home() / ".local" / "state") / "offload_moe"


def names_in(folder: Path) -> set[str] | None:
    """What is in a folder; None where there is none, or a link to one."""
    if not folder.is_dir() or folder.is_symlink():
        return None
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:  # deleted meanwhile
        return None


def config_file(environ: Mapping[str, str] | None = None, platform: str | None = None) -> Path | None:
    """The file of the user's settings, which may not exist; None where there is no home folder.

    `OFFLOAD_MOE_CONFIG` wins; then `offload_moe/config.toml` in `XDG_CONFIG_HOME` or `~/.config`, on macOS in
    `~/Library/Application Support`, on Windows in `%APPDATA%`.
    """
    environ = os.environ if environ is None else environ
    platform = sys.platform if platform is None else platform
    if chosen := environ.get(CONFIG_VARIABLE):
        return user_path(chosen)
    base = environ.get({"win32": "APPDATA", "darwin": ""}.get(platform, "XDG_CONFIG_HOME"), "")
    usual = {"win32": "AppData/Roaming", "darwin": "Library/Application Support"}.get(platform, ".config")
    try:
        folder = Path(base) if os.path.isabs(base) else _home() / usual
    except ConfigError:
        return None
    return folder / "offload_moe" / "config.toml"


def check_writable(path: Path) -> None:
    """Check that a file can be written, before the work whose result it takes. Raises: ConfigError."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{path} cannot be written: its folder does not exist. Make it, or choose another.")
    if path.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a folder. Name a file in it.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"{path} cannot be written: the system refuses it. Choose another place.")


def user_path(name: str | Path) -> Path:
    """A path as a user writes it, with `~` for a home folder. Raises: ConfigError where there is no such home."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        user = Path(name).parts[0][1:]
        raise ConfigError(f"{name} names the folder of a user who does not exist." if user else _NO_HOME) from error


_NO_HOME = "There is no home folder. Set HOME, or OFFLOAD_MOE_CACHE to a folder for models that can be written."


def _home() -> Path:
    return user_path("~")


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
