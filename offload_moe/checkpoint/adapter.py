"""LoRA adapters in PEFT's files, merged into the weights of a checkpoint as they are read.

O out features, K in features, r rank. Source: peft, src/peft/tuners/lora/layer.py, `get_delta_weight`, and
src/peft/utils/other.py, `get_pattern_key`.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from offload_moe.checkpoint.header import TensorEntry, read_header
from offload_moe.checkpoint.json_file import read_json
from offload_moe.checkpoint.shards import read_part
from offload_moe.checkpoint.tensors import TensorSource, row_chunks
from offload_moe.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
# Settings under which the two matrices are not all that the adapter does.
REFUSED = (
    *("use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "modules_to_save", "layer_replication"),
    *("alora_invocation_tokens", "trainable_token_indices", "megatron_config"),
    *("kasa_config", "arrow_config", "monteclora_config"),
)
# The others, such as pissa, subtract their first values from the base weights, or quantize those.
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PATTERN_SECONDS = 1.0  # of one comparison, which takes microseconds: an expression may need exponential time
ADVICE = "Merge it with peft's merge_and_unload(), and convert that folder."


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The change of one weight: scale times up ``[O, r]`` times down ``[r, K]``, read when they are needed."""

    down: TensorEntry
    up: TensorEntry
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    def added(self, weight: Tensor, first_row: int) -> Tensor:
        """Rows ``[o, K]`` of the weight, from the first one on, with the change, in their dtype."""
        up = read_part(self.up, first_row, first_row + len(weight)).float()
        down = read_part(self.down, 0, self.down.shape[0]).float()
        return (weight.float() + self.scale * (up @ down)).to(weight.dtype)

    def is_finite(self) -> bool:
        return all(bool(read_part(half, 0, half.shape[0]).isfinite().all()) for half in (self.down, self.up))


class Adapter:
    """One adapter: the change of each weight, by the weight's name in the checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Check all of it; its matrices stay in the file. Raises: CheckpointError naming what cannot be merged."""
        self.folder = folder
        self.name = folder.resolve().name
        settings = _settings(folder)
        path = folder / WEIGHTS
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {WEIGHTS}. Pickled adapters (.bin) are never read: save it again.")
        entries = read_header(path)
        _check_is_lora(path, entries)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(json.dumps(settings, sort_keys=True).encode())
        self.sha256 = digest.hexdigest()
        self.pairs = dict(_pairs(path, entries, settings))

    def check(self, entries: Mapping[str, TensorEntry]) -> None:
        """Check that every change has its weight. Raises: CheckpointError with the names and shapes."""
        missing = [name for name in self.pairs if name not in entries]
        if missing:
            raise CheckpointError(
                f"{self.folder}: the adapter changes {missing[0]} ({len(missing)} such weights), which the checkpoint "
                f"does not have under that name. {ADVICE}"
            )
        for name, pair in self.pairs.items():
            if entries[name].shape != pair.shape:
                raise CheckpointError(
                    f"{self.folder} is an adapter of another model: {name} is {list(entries[name].shape)}, its change "
                    f"{list(pair.shape)}."
                )


class AdaptedTensors:
    """A checkpoint's tensors with the changes of an adapter."""

    def __init__(self, stored: TensorSource, adapter: Adapter) -> None:
        """Compare names and shapes. Raises: CheckpointError where the adapter does not fit."""
        adapter.check(stored.entries)
        self.stored = stored
        self._pairs = adapter.pairs
        self.entries = stored.entries
        self.paths = stored.paths
        self.notices = stored.notices

    def changes(self, names: Iterable[str]) -> bool:
        """Whether any of these tensors is changed."""
        return any(name in self._pairs for name in names)

    def paths_of(self, name: str) -> frozenset[Path]:
        return self.stored.paths_of(name)

    def release(self, path: Path) -> None:
        self.stored.release(path)

    def read(self, name: str) -> Tensor:
        value = self.stored.read(name)
        return self._pairs[name].added(value, 0) if name in self._pairs else value

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = self.stored.read_rows(name, start, stop)
        return self._pairs[name].added(rows, start) if name in self._pairs else rows

    def is_by_rows(self, name: str) -> bool:
        return self.stored.is_by_rows(name)

    def chunks(self, name: str, chunk_bytes: int) -> Iterator[Tensor]:
        return row_chunks(self, name, chunk_bytes) if name in self._pairs else self.stored.chunks(name, chunk_bytes)

    def close(self) -> None:
        self.stored.close()


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    settings = read_json(path, f"{folder} is no PEFT adapter: it has no {CONFIG}.")
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise CheckpointError(f"{path}: only LoRA adapters are merged, not {kind!r}. {ADVICE}")
    found = [name for name in REFUSED if settings.get(name)]
    if settings.get("bias", "none") != "none":
        found.append("bias")
    if not _keeps_base(settings.get("init_lora_weights")):
        found.append(f"init_lora_weights {settings['init_lora_weights']!r}")
    if found:
        raise CheckpointError(f"{path}: an adapter with {', '.join(found)} is not merged here. {ADVICE}")
    patterns = settings.get("alpha_pattern")
    if patterns and not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: alpha_pattern is {str(patterns)[:80]!r}, which is no object. {ADVICE}")
    return settings


def _keeps_base(init: object) -> bool:
    """Whether the two matrices are changes of the weights as they are in the checkpoint."""
    return (init.lower() if isinstance(init, str) else init) in KEEPS_BASE


def _check_is_lora(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Raises: CheckpointError naming a tensor that is no half of a pair."""
    for name, entry in entries.items():
        ending = next((ending for ending in (DOWN, UP) if name.endswith(ending)), None)
        other = None if ending is None else name.removesuffix(ending) + (UP if ending == DOWN else DOWN)
        if not name.startswith(PREFIX) or other not in entries or len(entry.shape) != 2:
            raise CheckpointError(f"{path}: {name} is not merged here: no pair of lora_A and lora_B. {ADVICE}")
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} is {entry.dtype}. Save the adapter in bfloat16 or float32.")
    if not entries:
        raise CheckpointError(f"{path} has no tensors.")


def _pairs(path: Path, entries: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> Iterator[tuple[str, Pair]]:
    for name, down in entries.items():
        if not name.endswith(DOWN):
            continue
        module = name.removesuffix(DOWN)
        up, rank = entries[module + UP], down.shape[0]
        if up.shape[1] != rank or not rank:
            raise CheckpointError(f"{path}: {module} has lora_A of rank {rank}, lora_B of {up.shape[1]}.")
        changed = module.removeprefix(PREFIX)
        pair = Pair(down=down, up=up, scale=_scale(path.with_name(CONFIG), changed, rank, settings))
        if not pair.is_finite():
            raise CheckpointError(f"{path}: {module} has NaN or infinite weights.")
        yield f"{changed}.weight", pair


def _scale(path: Path, module: str, rank: int, settings: Mapping[str, Any]) -> float:
    patterns = settings.get("alpha_pattern") or {}
    found = next((key for key in patterns if _matches(path, key, module)), None)
    alpha = settings.get("lora_alpha") if found is None else patterns[found]
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < math.inf:
        raise CheckpointError(f"{path}: lora_alpha of {module} is {alpha!r}, which is no number.")
    try:
        return float(alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank)
    except OverflowError:
        raise CheckpointError(f"{path}: lora_alpha of {module} is too large.") from None


def _matches(path: Path, key: str, module: str) -> bool:
    """Whether an expression in the settings is about a module. Raises: CheckpointError for one that is none."""
    try:
        return regex.match(rf"(.*\.)?({key})$", module, timeout=PATTERN_SECONDS) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
        reason = str(error) or "it takes too long"
        raise CheckpointError(f"{path}: alpha_pattern {key[:80]!r} cannot be compared: {reason}. {ADVICE}") from error
