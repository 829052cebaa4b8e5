"""Routing traces: the routed experts of every token, and the recorded costs.

A trace is an npz file. Shapes: T tokens, L MoE layers, K top-k, E experts per layer, S sequences, F forwards, R tiers.
Required: `experts` [T, L, K] and `num_experts`. Everything else is optional, and unknown arrays are ignored.
docs/decisions/030-policies.md has the table.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from offload_moe.errors import ConfigError
from offload_moe.residency.keys import ExpertKeys
from offload_moe.system.whole_files import write_whole

Array = NDArray[Any]

_SHAPES = {
    "experts": "TLK",
    "experts_per_layer": "L",
    "weights": "TLK",
    "router_probabilities": "TLE",
    "token_ids": "T",
    "is_prompt": "T",
    "forwards": "T",
    "outcomes": "TLKR",
    "computed_on_cpu": "TLK",
    "stall_s": "FLR",
    "loaded_bytes": "FLR",
    "prefetch_issued": "FLR",
    "prefetch_useful": "FLR",
    "compute_s": "FL",
    "forward_s": "F",
}
_KINDS = {"i": "iu", "f": "f", "b": "b"}
_FLOATS = {"weights", "router_probabilities", "stall_s", "compute_s", "forward_s"}
_BOOLEANS = {"is_prompt", "computed_on_cpu"}

HIT, DELAYED_HIT, MISS = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """The routing of sequences, token by token, and optionally its costs. Arrays are not copied; do not write to them.

    Raises: ConfigError when an array's shape, type or values do not fit the others.
    """

    experts: Array  # [T, L, K] integer ids, 0 .. num_experts - 1
    num_experts: int  # per layer; the largest where layers differ
    experts_per_layer: Array | None = None  # [L] where they differ
    sequence_lengths: Array  # [S] tokens per sequence, in order; they sum to T
    weights: Array | None = None  # [T, L, K] routing weights, in the order of `experts`
    router_probabilities: Array | None = None  # [T, L, E] the router's distribution before top-k
    token_ids: Array | None = None  # [T] the input token
    is_prompt: Array | None = None  # [T] bool: prompt, not generated
    forwards: Array | None = None  # [T] non-decreasing: which forward computed the token (a prompt chunk is one)
    tiers: tuple[str, ...] = ()  # names of the R tiers below, fastest first
    outcomes: Array | None = None  # [T, L, K, R] HIT, DELAYED_HIT or MISS
    computed_on_cpu: Array | None = None  # [T, L, K] bool
    stall_s: Array | None = None  # [F, L, R] seconds compute waited for the tier
    loaded_bytes: Array | None = None  # [F, L, R] bytes brought into the tier
    prefetch_issued: Array | None = None  # [F, L, R] prefetches for this layer
    prefetch_useful: Array | None = None  # [F, L, R] of them used before they were evicted
    compute_s: Array | None = None  # [F, L] seconds in the experts of the layer
    forward_s: Array | None = None  # [F] seconds of the whole forward
    metadata: str = "{}"  # JSON object: model, revision, codec, policy, slots, versions, source and licence

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def keys(self) -> ExpertKeys:
        """Keys of the experts of all layers."""
        sizes = self.experts_per_layer
        return ExpertKeys([self.num_experts] * self.num_layers if sizes is None else sizes.tolist())

    @property
    def num_tokens(self) -> int:
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[2])

    def select(self, sequences: Sequence[int]) -> "Trace":
        """The routing of some sequences, in the given order, without the measurements per forward."""
        ends = np.cumsum(self.sequence_lengths)
        starts = ends - self.sequence_lengths
        rows = np.concatenate([np.arange(starts[i], ends[i]) for i in sequences]).astype(np.intp)
        return self._take(rows, self.sequence_lengths[list(sequences)])

    def head(self, num_tokens: int) -> "Trace":
        """The routing of the first tokens; the last sequence may be truncated."""
        rows = np.arange(min(num_tokens, self.num_tokens))
        lengths = np.diff(np.minimum(np.cumsum(self.sequence_lengths), len(rows)), prepend=0)
        return self._take(rows, lengths[lengths > 0])

    def _take(self, rows: Array, lengths: Array) -> "Trace":
        dropped = dict.fromkeys((name for name, shape in _SHAPES.items() if shape.startswith("F")), None)
        taken = {
            name: array[rows]
            for name, shape in _SHAPES.items()
            if shape.startswith("T") and (array := getattr(self, name)) is not None
        }
        return replace(self, sequence_lengths=lengths, **{**dropped, **taken, "forwards": None})


def layer_sizes(num_experts: Sequence[int]) -> dict[str, Any]:
    """How a `Trace` names the number of experts of each layer."""
    most = max(num_experts)
    differ = min(num_experts) < most
    return {"num_experts": most, "experts_per_layer": np.array(num_experts) if differ else None}


def load_trace(path: str | Path) -> Trace:
    """Read a trace.

    Raises: ConfigError when the file is missing, is not an npz file, or is not a valid trace.
    """
    try:
        with open(path, "rb") as stream:  # numpy does not close a damaged file
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, NpzFile):
                raise ValueError("it holds one bare array")
            arrays = {name: file[name] for name in file.files if name in _NAMES}
    except FileNotFoundError:
        raise ConfigError(f"Trace {path} does not exist.") from None
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise ConfigError(f"Trace {path} is not a readable npz file ({error}).") from error
    for name in ("experts", "num_experts"):
        if name not in arrays:
            raise ConfigError(f"Trace {path} has no array {name!r}. It needs at least experts and num_experts.")
    try:
        return _from_arrays(arrays)
    except ConfigError as error:
        raise ConfigError(f"Trace {path}: {error}") from error


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace, compressed, to exactly this path: whole or not at all. Raises: OSError that names the file."""
    values = {name: np.asarray(value) for name in sorted(_NAMES) if (value := getattr(trace, name)) is not None}
    file = BytesIO()
    np.savez_compressed(file, allow_pickle=False, **values)
    write_whole(Path(path), file.getvalue())


def _from_arrays(arrays: dict[str, Array]) -> Trace:
    values: dict[str, Any] = dict(arrays)
    if arrays["num_experts"].size != 1 or arrays["num_experts"].dtype.kind not in "iu":
        raise ConfigError(f"num_experts must be one integer, got {arrays['num_experts'].tolist()!r:.60}.")
    values["num_experts"] = int(arrays["num_experts"].item())
    values.setdefault(
        "sequence_lengths", np.array([len(arrays["experts"])]) if arrays["experts"].ndim else np.array([])
    )
    values["tiers"] = tuple(str(name) for name in np.atleast_1d(arrays.get("tiers", np.array([], dtype=str))))
    if "metadata" in arrays:
        values["metadata"] = str(arrays["metadata"])
    return Trace(**values)


def _validate(trace: Trace) -> None:
    if trace.experts.ndim != 3 or 0 in trace.experts.shape:
        raise ConfigError(f"experts must be [tokens, layers, top-k] and not empty, got {list(trace.experts.shape)}.")
    sizes = dict(zip("TLK", trace.experts.shape, strict=True))
    sizes["E"] = trace.num_experts
    sizes["R"] = len(trace.tiers)
    for name, letters in _SHAPES.items():
        array: Array | None = getattr(trace, name)
        if array is not None:
            _check_array(name, array, letters, sizes)
    low, high = int(trace.experts.min()), int(trace.experts.max())
    if low < 0 or high >= trace.num_experts:
        raise ConfigError(f"expert ids must lie in 0..{trace.num_experts - 1}, found {low}..{high}.")
    if trace.experts_per_layer is not None:
        _check_layers(trace, trace.experts_per_layer)
    _check_distinct(trace.experts)
    total = int(np.sum(trace.sequence_lengths))
    if total != trace.num_tokens or np.any(np.asarray(trace.sequence_lengths) < 0):
        raise ConfigError(f"sequence_lengths sum to {total} tokens, experts has {trace.num_tokens}.")


def _check_layers(trace: Trace, sizes: Array) -> None:
    if sizes.max() != trace.num_experts:
        raise ConfigError(f"experts_per_layer has at most {sizes.max()} experts, num_experts says {trace.num_experts}.")
    highest = trace.experts.max(axis=(0, 2))
    for layer in np.flatnonzero(highest >= sizes):
        raise ConfigError(f"layer {layer} has {sizes[layer]} experts, found expert {highest[layer]}.")


def _check_array(name: str, array: Array, letters: str, sizes: dict[str, int]) -> None:
    """Shape against the sizes known so far; the first array with an F defines it."""
    kind = _KINDS["f" if name in _FLOATS else "b" if name in _BOOLEANS else "i"]
    if array.dtype.kind not in kind:
        raise ConfigError(f"{name} has type {array.dtype}, expected one of kind {kind!r}.")
    if "F" in letters and array.ndim:
        sizes.setdefault("F", array.shape[0])
    expected = [sizes.get(letter) for letter in letters]
    if list(array.shape) != expected:
        raise ConfigError(f"{name} has shape {list(array.shape)}, expected {expected} [{', '.join(letters)}].")


def _check_distinct(experts: Array) -> None:
    ordered = np.sort(experts, axis=-1)
    repeated = np.argwhere((ordered[..., 1:] == ordered[..., :-1]).any(axis=-1))
    if len(repeated):
        token, layer = repeated[0]
        raise ConfigError(f"token {token}, layer {layer} lists an expert twice: {experts[token, layer].tolist()}.")


_NAMES = frozenset(field.name for field in fields(Trace))
