"""Extensions: policies, models, layers, adapters and codecs that other packages register as entry points.

Names are read from the metadata of the installed packages; a package is imported when one of its names is used. The
owner of each kind looks among its built-in names first, so an extension cannot replace one of those.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from offload_moe.errors import ConfigError, OffloadMoeError

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

Kind = Literal["policy", "model", "layer", "adapter", "codec"]
GROUPS: dict[str, Kind] = {
    "offload_moe.policies": "policy",
    "offload_moe.models": "model",
    "offload_moe.layers": "layer",
    "offload_moe.adapters": "adapter",
    "offload_moe.codecs": "codec",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """One registered name. distribution: name and version. folder: where it is installed."""

    kind: Kind
    name: str
    distribution: str
    folder: str
    entry: "EntryPoint"

    def load(self) -> Any:
        """Import what is registered. Raises: ConfigError that names the distribution, whatever the import raises."""
        try:
            return self.entry.load()
        except (Exception, SystemExit) as error:
            raise self.fault(f"cannot be imported: {_reason(error)}") from error

    @contextmanager
    def guard(self, *passing: type[BaseException]) -> Iterator[None]:
        """Around a call of the extension. Raises: ConfigError that names the distribution.

        passing: errors that are not the extension's, beside this package's own and a lack of memory.
        """
        own: tuple[type[BaseException], ...] = (OffloadMoeError, MemoryError, *passing)
        try:
            yield
        except own:
            raise
        except Exception as error:
            raise self.fault(f"failed: {_reason(error)}") from error

    def fault(self, what: str) -> ConfigError:
        """The error that says what the extension did."""
        return ConfigError(
            f"The {self.kind} {self.name!r} of {self.distribution} {what.rstrip('.')}. Update that package, or "
            f"uninstall it."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """Everything that is registered. unreadable: distributions whose entry points cannot be read."""

    extensions: tuple[Extension, ...]
    unreadable: tuple[str, ...]


@cache
def installed() -> Installed:
    """What the packages on the import path register; read once per process."""
    from importlib.metadata import distributions

    found: dict[tuple[Kind, str, str], Extension] = {}
    unreadable = []
    for distribution in distributions():
        try:
            extensions = list(_extensions_of(distribution))
        except Exception as error:  # a file of another package may hold anything
            unreadable.append(f"{distribution.name}: {_reason(error)}")
            continue
        for each in extensions:  # the first on the path hides others of its name, as for imports
            package = re.sub(r"[-_.]+", "-", each.distribution.rpartition(" ")[0]).lower()  # one name, however written
            found.setdefault((each.kind, each.name, package), each)
    return Installed(extensions=tuple(found.values()), unreadable=tuple(unreadable))


def with_extensions(kind: Kind, built_in: Sequence[str]) -> tuple[str, ...]:
    """The built-in names, and after them those of extensions, sorted."""
    names = {extension.name for extension in installed().extensions if extension.kind == kind}
    return (*built_in, *sorted(names - set(built_in)))


def find_extension(kind: Kind, name: str) -> Extension | None:
    """What is registered under a name that is not built in. Raises: ConfigError where two packages register it."""
    found = [each for each in installed().extensions if (each.kind, each.name) == (kind, name)]
    if len(found) > 1:
        packages = " and ".join(each.distribution for each in found)
        raise ConfigError(f"The {kind} {name!r} is registered by {packages}. Uninstall all but one of them.")
    return found[0] if found else None


def _extensions_of(distribution: "Distribution") -> Iterator[Extension]:
    for entry in distribution.entry_points:
        if entry.group in GROUPS:
            yield Extension(
                kind=GROUPS[entry.group],
                name=entry.name,
                distribution=f"{distribution.name} {distribution.version}",
                folder=str(distribution.locate_file("")),
                entry=entry,
            )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
