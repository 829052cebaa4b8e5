"""Names of models, resolved without importing torch, so that a wrong name is an error at once."""

import re
from collections.abc import Collection, Iterable
from difflib import SequenceMatcher
from pathlib import Path
from urllib.parse import unquote, urlsplit

from offload_moe.errors import CheckpointError, ConfigError, StoreError
from offload_moe.system.paths import cache_dir, user_path

DEMO = "demo"
STORES, DEMOS = "stores", "demo"  # folders of the cache
INPUTS, DOWNLOAD = ".calibration", ".download"  # suffixes of folders beside a store while it is made
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
ALIKE = 0.7  # similarity of two names, 0 to 1, from which one is proposed for the other
MOST_SHOWN = 10


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` may be a hub id: `organisation/model`."""
    return re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", text) is not None and ".." not in text


def split_gguf_name(name: str) -> tuple[str, str] | None:
    """Repository and file of `organisation/model:Q4_K_M`, which means a GGUF file; None for another name."""
    repo_id, colon, wanted = name.partition(":")
    if not colon or not looks_like_hub_id(repo_id) or re.fullmatch(r"[\w.*?\[\]/-]{1,200}", wanted) is None:
        return None
    return None if wanted.startswith("/") else (repo_id, wanted)


def names_hub(text: str) -> bool:
    """Whether `text` may be on the hub: a repository, or a GGUF file of one."""
    return looks_like_hub_id(text) or split_gguf_name(text) is not None


def hub_name(source: str | Path, revision: str | None = None) -> tuple[str | Path, str | None]:
    """A hub URL as id and revision; any other source unchanged.

    Raises: ConfigError for a URL of anything but a model, or of another revision than the given one.
    """
    match = re.fullmatch(r"(?:https?://)?([^/]+)/+(.+)", str(source).strip(), re.IGNORECASE)
    if isinstance(source, Path) or match is None or match[1].lower() not in HUB_HOSTS:
        return source, revision
    parts = [unquote(part) for part in urlsplit(f"https://host/{match[2]}").path.split("/") if part]
    repo_id, rest = "/".join(parts[:2]), parts[2:]
    if not looks_like_hub_id(repo_id) or parts[0] in ("datasets", "spaces") or (rest and rest[0] not in _VIEWS):
        raise ConfigError(f"{source} is no model on the hub. Give its id, such as organisation/model.")
    named = rest[1] if len(rest) > 1 else None
    if named is not None and revision not in (None, named):
        raise ConfigError(f"{source} names the revision {named}, --revision is {revision}. Leave one of them out.")
    return repo_id, named or revision


_VIEWS = ("tree", "blob", "resolve", "commit")  # path parts of the hub's pages that precede a revision


def resolve(name: str | Path, cache: Path | None = None) -> Path:
    """Resolve a name: an existing path, else the entry of the cache folder with that name, else the path.

    The beginning of a store's name is enough if no other store's name begins with it.

    Raises: StoreError when several names begin with it.
    """
    path = resolve_whole(name, cache)
    if path.exists() or not _is_name(name):
        return path
    root = cache_dir() if cache is None else cache
    for folder in (STORES, DEMOS):
        found = [entry for entry in _entries(root / folder) if entry.startswith(path.name)]
        if len(found) == 1:
            return root / folder / found[0]
        if found:
            raise StoreError(f"{name} could be any of: {_list(found)}. Write more of the name.")
    return path


def resolve_whole(name: str | Path, cache: Path | None = None) -> Path:
    """As `resolve`, for a complete name, such as the source in a store's manifest."""
    path = user_path(name)
    if path.exists() or not _is_name(name):
        return path
    root = cache_dir() if cache is None else cache
    entries = (root / folder / path.name for folder in (STORES, DEMOS))
    return next((entry for entry in entries if entry.is_dir()), path)


def is_whole_name(name: str | Path, cache: Path | None = None) -> bool:
    """Whether it is the demo, a path that exists or an entry of the cache folder, not the beginning of one."""
    return name == DEMO or resolve_whole(name, cache).exists()


def _is_name(name: str | Path) -> bool:
    """Whether `name` may be an entry of the cache folder: no path, and not the demo."""
    path = Path(name)
    return path.name == str(name) and path.name not in ("", "..", DEMO)


def check_model(name: str | Path, revision: str | None = None) -> None:
    """Check that `name` can be loaded or planned.

    Raises: CheckpointError when it cannot; ConfigError as `hub_name`.
    """
    source, _ = hub_name(name, revision)
    if source == DEMO or names_hub(str(source)) or resolve(source).exists():
        return
    raise CheckpointError(
        f"{name} is neither a file or folder, nor a hub id like organisation/model, nor {DEMO!r}, nor a name that "
        f"`offload-moe list` shows. {did_you_mean(str(name), (DEMO, *all_names()), otherwise='Check the path.')}"
    )


def check_source(source: str | Path) -> None:
    """Check that `source` can be converted. Raises: CheckpointError."""
    if not user_path(source).exists() and not names_hub(str(source)):
        raise CheckpointError(f"{source} is neither a folder nor a hub id like organisation/model. Check the path.")


def check_installed(name: str | Path) -> None:
    """Check that `name` is a folder or an entry of the cache. Raises: StoreError."""
    if name != DEMO and not resolve(name).exists():
        meant = did_you_mean(str(name), (DEMO, *all_names()), otherwise="")
        raise StoreError(
            f"{name} is no folder, and no name in the cache. {meant}{' ' if meant else ''}"
            "`offload-moe list` shows what is installed."
        )


def all_names() -> list[str]:
    """The names that `offload-moe list` shows."""
    return [entry for folder in (STORES, DEMOS) for entry in _entries(cache_dir() / folder)]


def choice(what: str, name: str, choices: Collection[str]) -> str:
    """`name`, if it is one of the choices. Raises: ConfigError with the list of choices."""
    if name in choices:
        return name
    raise no_such(what, name, choices)


def no_such(what: str, name: str, choices: Collection[str]) -> ConfigError:
    """The error for a name that is none of the choices."""
    return ConfigError(
        f"There is no {what} {name!r}. {did_you_mean(str(name), choices, otherwise='')} ".rstrip()
        + f" Choose one of: {', '.join(choices)}."
    )


def did_you_mean(word: str, choices: Iterable[str], *, otherwise: str) -> str:
    """A question with the most similar name; `otherwise` if none is similar."""
    likeness = {known: _likeness(word.lower(), known.lower()) for known in choices}
    best = max(likeness, key=likeness.__getitem__, default="")
    return f"Did you mean {best}?" if best and likeness[best] >= ALIKE else otherwise


def _likeness(word: str, known: str) -> float:
    """Similarity to the whole name, or to its beginning of the same length."""
    return max(SequenceMatcher(None, word, part).ratio() for part in (known, known[: len(word)]))


def _entries(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    names = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    beside = {name + suffix for name in names for suffix in (INPUTS, DOWNLOAD)}
    return sorted(names - beside)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + more
