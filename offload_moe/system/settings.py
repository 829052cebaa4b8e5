"""Defaults that a user keeps for the command line: in the environment, and in a file in TOML."""

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_moe.errors import ConfigError
from offload_moe.system.folders import make_folder
from offload_moe.system.names import DEMO, choice
from offload_moe.system.paths import config_file, user_path
from offload_moe.system.sizes import parse_port, parse_size, parse_tokens
from offload_moe.system.whole_files import write_whole

UNSET = "default"  # the origin of a value that is not set


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A default that can be set.

    read: its text as a value; raises ConfigError. default: the value where nothing is set.
    """

    read: Callable[[str], Any]
    example: str
    default: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The value of a setting, as text too, and where it comes from: a variable, a file, or `UNSET`."""

    value: Any
    text: str
    origin: str


def _model(text: str) -> str:
    if not text.strip():
        raise ConfigError("The name of a model is empty. Give a store, a file, a hub id or demo.")
    return text


SETTINGS = {
    "model": Setting(read=_model, example=DEMO, default=DEMO),
    "vram": Setting(read=parse_size, example="10GiB"),
    "ram": Setting(read=parse_size, example="32GiB"),
    "context": Setting(read=parse_tokens, example="8192"),
    "port": Setting(read=parse_port, example="8000", default=8000),
}


def read_settings(environ: Mapping[str, str] | None = None) -> dict[str, Chosen]:
    """Every setting, from its variable, else the file, else its default. Raises: ConfigError with variable or file."""
    environ = os.environ if environ is None else environ
    path = config_file(environ)
    written = {} if path is None else _written(path)
    return {name: _chosen(name, setting, environ, path, written) for name, setting in SETTINGS.items()}


def write_setting(name: str, text: str | None) -> Path | None:
    """Set a default in the file, which keeps its other lines; None removes it.

    Returns the file; None where there was nothing to remove.

    Raises: ConfigError when name or value is not usable, or the file is damaged; OSError when it cannot be written.
    """
    setting, path = SETTINGS[choice("setting", name, SETTINGS)], config_file()
    if path is None:
        raise ConfigError("There is no home folder for the file of settings. Set OFFLOAD_MOE_CONFIG to a file.")
    written = _written(path)
    if text is None and name not in written:
        return None
    expected = {key: value for key, value in written.items() if key != name}
    line = ""
    if text is not None:
        setting.read(text)
        if name == "model" and text != DEMO and user_path(text).exists():
            text = str(user_path(text).absolute())
        expected[name] = text
        line = f"{name} = {_toml(text)}\n"
    _replace(path, _with_line(path, name, line), expected)
    return path


def _chosen(
    name: str, setting: Setting, environ: Mapping[str, str], path: Path | None, written: Mapping[str, str]
) -> Chosen:
    variable = f"OFFLOAD_MOE_{name.upper()}"
    if text := environ.get(variable):
        origin = variable
    elif name in written:
        text, origin = written[name], str(path)
    else:
        text = "" if setting.default is None else str(setting.default)
        return Chosen(value=setting.default, text=text, origin=UNSET)
    try:
        return Chosen(value=setting.read(text), text=text, origin=origin)
    except ConfigError as error:
        place = variable if origin == variable else f"{name} in {origin}"
        raise ConfigError(f"{place} is not usable: {error}") from None


def _written(path: Path) -> dict[str, str]:
    """The settings of a file, as text; none where there is no file."""
    try:
        return _read(path.read_bytes(), path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"The settings in {path} cannot be read: {error.strerror}.") from error


def _read(data: bytes, path: Path) -> dict[str, str]:
    try:
        found = tomllib.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f'{path} is not TOML: {error}. A line of it looks like: ram = "32GiB"') from error
    for name, value in found.items():
        try:
            choice("setting", name, SETTINGS)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        if not isinstance(value, str | int) or isinstance(value, bool):
            example = f"{name} = {_toml(SETTINGS[name].example)}"
            raise ConfigError(f"{path}: {name} is neither text nor a whole number. Write it like: {example}")
    return {name: str(value) for name, value in found.items()}


def _toml(text: str) -> str:
    return text if re.fullmatch("0|[1-9][0-9]*", text) else json.dumps(text, ensure_ascii=False)


def _with_line(path: Path, name: str, line: str) -> str:
    """The text of the file with the line in place of that of the same setting, or at the end."""
    text = path.read_bytes().decode("utf-8-sig") if path.exists() else ""
    end = "\r\n" if "\r\n" in text else "\n"
    line, lines = line.replace("\n", end), text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += end
    at = next((n for n, old in enumerate(lines) if re.match(rf"\s*{name}\s*=", old)), None)
    if at is None:
        return "".join([*lines, line])
    return "".join([*lines[:at], line, *lines[at + 1 :]])


def _replace(path: Path, text: str, expected: Mapping[str, str]) -> None:
    """Write the file whole or not at all; a link stays one, and a mode what it is."""
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise ConfigError(f"{path} is no file, so no default can be kept there. Name another with OFFLOAD_MOE_CONFIG.")
    if _read(text.encode(), path) != expected:
        raise ConfigError(f"{path} has a form that cannot be changed here. Edit it with an editor.")
    make_folder(target.parent)
    write_whole(path, text.encode())
