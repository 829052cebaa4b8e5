"""The command that resumes an unfinished conversion, from the settings in its journal."""

import json
import shlex
from pathlib import Path
from typing import Any

from offload_moe.quant import LEAST_ERROR
from offload_moe.store.in_place import GGUF
from offload_moe.store.journal import JOURNAL_NAME
from offload_moe.system.names import names_hub

AUTO = "auto"  # as a text of a calibration: the built-in one
FLAGS = {"text": "--calibrate", "imatrix": "--imatrix"}  # by the kind of importances


def begun_with(folder: Path) -> dict[str, Any]:
    """The settings in the journal of a conversion; empty where it cannot be read."""
    try:
        with (folder / JOURNAL_NAME).open("rb") as file:
            settings = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def resume_advice(folder: Path) -> str:
    """The command that resumes the conversion in a folder, and what the files are of which only names are known."""
    begun = begun_with(folder)
    source = _text(begun, "source") or "SOURCE"
    arguments = [source, str(folder)]
    named = []  # files and folders by their names alone, since a journal has no paths of them
    if _text(begun, "codec") != GGUF:  # which is the default of a GGUF file, and no choice
        arguments += _flag("--codec", _text(begun, "codec")) + _flag("--dense-codec", _text(begun, "dense codec"))
    if _text(begun, "scales") != LEAST_ERROR:
        arguments += _flag("--scales", _text(begun, "scales"))
    importances = _part(begun, "importances")
    weighed, by = FLAGS.get(_text(importances, "kind") or ""), _text(importances, "name")
    if weighed is not None and by is not None:
        arguments += [weighed, by]
        named += [] if (weighed, by) == ("--calibrate", AUTO) else [f"{by}: the same file"]
    if (adapter := _text(_part(begun, "adapter"), "name")) is not None:
        arguments += ["--adapter", adapter]
        named.append(f"{adapter}: the folder of the adapter")
    arguments += _flag("--revision", _text(begun, "revision"))
    arguments += ["--delete-source-shards"] if begun.get("--delete-source-shards") else []
    if not names_hub(source) and Path(source).suffix.lower() != ".gguf":
        named.insert(0, f"{source}: the folder of the checkpoint")
    more = f" ({'; '.join(named)})" if named else ""
    return f"Resume it with: offload-moe quantize {shlex.join(arguments)}{more}"


def _flag(flag: str, value: str | None) -> list[str]:
    return [] if value is None else [flag, value]


def _text(settings: dict[str, Any], key: str) -> str | None:
    value = settings.get(key)
    return value if isinstance(value, str) else None


def _part(settings: dict[str, Any], key: str) -> dict[str, Any]:
    value = settings.get(key)
    return value if isinstance(value, dict) else {}
