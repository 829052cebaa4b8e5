"""The weight files of a model folder: those that transformers loads, in its order of precedence.

Source: transformers/modeling_utils.py, `_get_resolved_checkpoint_files`; utils/hub.py, `get_checkpoint_shard_files`.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from offload_moe.errors import CheckpointError
from offload_moe.system.paths import CONFIG_NAME

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
EXPLICIT_KEY = "transformers_weights"  # of config.json: the file to read instead
PICKLE_PATTERNS = ("*.bin", "*.pth", "*.pt", "*.ckpt")
ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Files that look like weights of the model, read or not.
WEIGHT_NAMES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf")
MAX_NAME_BYTES = 255  # of a single file
NUM_NAMED = 3  # file names in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The weight files of a model folder.

    names: of the files, sorted, relative to the folder. index: the file that lists them, None for a single file.

    promised: tensor name -> file name, from the index.
    """

    names: tuple[str, ...]
    index: str | None = None
    promised: Mapping[str, str] = field(default_factory=dict)

    def unused(self, present: Iterable[str]) -> str | None:
        """A notice of files that look like weights and are not read; None if there are none."""
        used = {*self.names, self.index}
        rest = [name for name in sorted(present) if name not in used and _looks_like_weights(name)]
        if not rest:
            return None
        chosen = self.index or self.names[0]
        return f"Not used, as transformers reads {chosen}: {listing(rest)}."


def choose_weights(folder: Path, present: Collection[str] | None = None) -> WeightFiles:
    """The weight files of a folder that contains at least the index, if there is one.

    present: names of all files, if the folder does not have them all yet.

    Raises: CheckpointError when there are no safetensors, or the index or a name in it is not usable.
    """
    there = present if present is not None else file_names(folder)
    explicit = _explicit_name(folder)
    if explicit is not None and not explicit.endswith(".index.json"):
        return WeightFiles(names=(explicit,))
    if explicit is None and SINGLE_NAME in there:
        return WeightFiles(names=(SINGLE_NAME,))
    index = explicit or INDEX_NAME
    if index in there:
        promised = _weight_map(folder, index)
        return WeightFiles(names=tuple(sorted(set(promised.values()))), index=index, promised=promised)
    raise CheckpointError(_nothing_to_read(folder, there, explicit))


def require(folder: Path, files: WeightFiles, present: Collection[str] | None = None) -> None:
    """Check that all files exist.

    present: as in `choose_weights`. Raises: CheckpointError when the index names missing files.
    """
    missing = [n for n in files.names if not ((folder / n).is_file() if present is None else n in present)]
    if missing:
        source = folder / files.index if files.index else f"{folder / 'config.json'} ({EXPLICIT_KEY})"
        raise CheckpointError(
            f"{source} names {listing(missing)}, which {'is' if len(missing) == 1 else 'are'} not there. Download the "
            "model again, or save it into an empty folder."
        )


def refuse_adapter(folder: Path | str, present: Iterable[str]) -> None:
    """Refuse a PEFT adapter, whose changes to the weights would be ignored. Raises: CheckpointError."""
    found = [name for name in ADAPTER_NAMES if name in set(present)]
    if found:
        raise CheckpointError(
            f"{folder} holds a PEFT adapter such as LoRA ({', '.join(found)}), which is not applied here. Merge it: "
            "`offload-moe quantize MODEL STORE --adapter FOLDER`, or in Python peft's AutoPeftModelForCausalLM"
            ".from_pretrained(...).merge_and_unload().save_pretrained(NEW_FOLDER); or remove these files to convert "
            "the base model alone."
        )


def file_names(folder: Path) -> frozenset[str]:
    """Names of the files directly in a folder, without broken links."""
    return frozenset(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else frozenset()


def safe_path(folder: Path, name: str) -> Path:
    """`folder/name`, if that name does not lead out of the folder; `links.check_links` checks links.

    Raises: CheckpointError.
    """
    parts = PurePosixPath(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or ".." in Path(name).parts:
        raise CheckpointError(
            f"{folder}: the file name {name!r} leads out of the checkpoint folder; refused. Put that file, or a "
            "link to it, into the folder and name it there."
        )
    if "\0" in name or not all(map(_can_be_a_name, parts)):
        raise CheckpointError(f"{folder}: {name[:80]!r} is no file name.")
    return folder / name


def _can_be_a_name(part: str) -> bool:
    try:
        return len(os.fsencode(part)) <= MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False


def listing(names: Collection[str]) -> str:
    """`a, b, c and 4 more`."""
    first = ", ".join(sorted(names)[:NUM_NAMED])
    return first if len(names) <= NUM_NAMED else f"{first} and {len(names) - NUM_NAMED} more"


def _explicit_name(folder: Path) -> str | None:
    """The file that the config names. Raises: CheckpointError for one that is no safetensors file of the folder."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # reported when the config is read
    name = config.get(EXPLICIT_KEY) if isinstance(config, dict) else None
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{folder / 'config.json'}: {EXPLICIT_KEY} is {name!r}, which is neither a safetensors file nor its index."
        )
    safe_path(folder, name)
    return name


def _weight_map(folder: Path, name: str) -> dict[str, str]:
    index = folder / name
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = {tensor: file_name for tensor, file_name in weight_map.items() if isinstance(file_name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a shard index: {error!r}. Download it again.") from error
    if not pairs or len(pairs) != len(weight_map):
        raise CheckpointError(
            f"{index} is not a shard index: its weight_map is empty or not made of file names. Download it again."
        )
    return {tensor: safe_path(folder, name).relative_to(folder).as_posix() for tensor, name in pairs.items()}


def _looks_like_weights(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in WEIGHT_NAMES)


def _nothing_to_read(folder: Path, present: Collection[str], explicit: str | None) -> str:
    if explicit is not None:
        return f"{folder / 'config.json'} names {explicit} ({EXPLICIT_KEY}), which is not there."
    pickles = sorted(name for name in present for pattern in PICKLE_PATTERNS if fnmatch(name, pattern))
    if pickles:
        return (
            f"{folder} has only a pickle checkpoint ({pickles[0]}): loading one can run any code, so it is refused. "
            "Use a safetensors version of the model."
        )
    others = [name for name in present if name.endswith(".safetensors") and "/" not in name]
    if others:
        return (
            f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}, only {listing(others)}. Download the index as well, "
            f"or rename a single file to {SINGLE_NAME}."
        )
    return f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}. Choose a model in safetensors."
