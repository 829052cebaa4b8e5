"""Removal of private data from a report: secrets, names of people and machines, paths."""

import getpass
import os
import platform
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

_SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_TOKENS = re.compile(r"\b(?:hf|sk|ghp|gho|github_pat|glpat|xox[a-z])[_-][A-Za-z0-9_-]{8,}")
_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
# From a slash, a tilde or a drive letter up to a space or a quote; rather too much than too little.
_PATHS = re.compile(r"(?<![\w.)\]])(?:~[\w.-]*/|/(?=[\w.~-])|\b[A-Za-z]:[\\/]|\\\\)[^\s'\"`,;:)]*")
_SHORTEST_SECRET = 6


class Redactor:
    """Replaces private data in a text, for one machine and one environment."""

    def __init__(
        self,
        *,
        environ: Mapping[str, str] | None = None,
        users: Iterable[str] | None = None,
        hosts: Iterable[str] | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        users = _users(environ) if users is None else users
        hosts = _hosts() if hosts is None else hosts
        secrets = (value for name, value in environ.items() if _SECRET_NAMES.search(name))
        self._secrets = _any_of(value for value in secrets if len(value) >= _SHORTEST_SECRET)
        self._hosts = _any_of(hosts, whole_words=True)
        self._users = _any_of(users, whole_words=True)

    def __call__(self, text: str) -> str:
        for pattern, replacement in (
            (self._secrets, "<secret>"),
            (_TOKENS, "<secret>"),
            (_IN_URL, ""),
            (_PATHS, "<path>"),
            (self._hosts, "<host>"),
            (self._users, "<user>"),
        ):
            if pattern is not None:
                text = pattern.sub(replacement, text)
        return text


def _any_of(words: Iterable[str], *, whole_words: bool = False) -> re.Pattern[str] | None:
    found = sorted({word for word in words if word}, key=len, reverse=True)
    if not found:
        return None
    either = "|".join(re.escape(word) for word in found)
    return re.compile(rf"(?<!\w)(?:{either})(?!\w)" if whole_words else either, re.IGNORECASE)


def _users(environ: Mapping[str, str]) -> list[str]:
    names = [environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")]
    with suppress(RuntimeError, OSError, KeyError, ImportError):
        names += [Path.home().name, getpass.getuser()]
    return names


def _hosts() -> list[str]:
    name = platform.node()
    return [name, name.partition(".")[0]]
