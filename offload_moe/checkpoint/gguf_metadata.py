"""The metadata of a GGUF file by key, each value of the type and within the range that a model can have."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from offload_moe.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
MOST_LAYERS = 512  # as in llama.cpp
MOST_HEADS = MOST_EXPERTS = 1 << 16
MOST = 1 << 24  # of a width or a length
MOST_TOKENS = 1 << 31
ADVICE = "Download the file again, or use a safetensors version of the model."
_BLOCK = re.compile(r"blk\.(\d+)\.")


class Metadata:
    """Of one architecture, whose name is in front of every key; shapes: of the file's tensors, by name."""

    def __init__(self, path: Path, values: Mapping[str, Any], shapes: Shapes) -> None:
        self.path, self.values, self.shapes = path, values, shapes
        self.architecture = str(values.get("general.architecture", ""))

    def get(self, key: str) -> Any:
        return self.values.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = MOST) -> int:
        """A whole number; of a list with one for each layer, the one that all have that have any.

        Raises: CheckpointError naming the key, also where it is missing without a default.
        """
        value = default if (found := self.get(key)) is None else found
        if isinstance(value, list) and len(several := set(value) - {0} or set(value)) == 1:
            (value,) = several
        if isinstance(value, list):
            raise self.refused(key, "is not the same in all layers, which is not supported")
        if type(value) is not int or not least <= value <= most:
            raise self.unusable(key, f"a whole number from {least} to {most}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A positive finite number. Raises: as `count`."""
        value = default if (found := self.get(key)) is None else found
        if not isinstance(value, int | float) or type(value) is bool or not 0 < value < math.inf:
            raise self.unusable(key, "a positive number")
        return float(value)

    def positive_or_none(self, key: str) -> float | None:
        """As `positive`; None where it is missing, or 0 as llama.cpp writes for none."""
        return self.positive(key) if self.get(key) else None

    def flag(self, key: str) -> bool:
        """False where it is missing. Raises: as `count`."""
        value = self.get(key)
        if value not in (None, False, True):  # and 0 and 1, which are equal to these
            raise self.unusable(key, "true or false")
        return bool(value)

    def per_layer(self, key: str) -> list[Any] | None:
        """One number for each layer; None where it is no list. Raises: CheckpointError for a list that is too short."""
        found = self.get(key)
        if isinstance(found, list) and len(found) < self.num_layers:
            raise self.refused(key, f"has {len(found)} values for {self.num_layers} layers")
        return found[: self.num_layers] if isinstance(found, list) else None

    def shape(self, name: str, num_dimensions: int) -> tuple[int, ...]:
        """Of a tensor. Raises: CheckpointError for one that is missing, or has other dimensions."""
        found = self.shapes.get(name)
        if found is None or len(found) != num_dimensions:
            what = "has no tensor" if found is None else f"is damaged: {list(found)} is the shape of its tensor"
            raise CheckpointError(f"{self.path} {what} {name}. Download it again.")
        return found

    @property
    def num_layers(self) -> int:
        """Without those for multi-token prediction. Raises: CheckpointError; also for more than the file has blocks."""
        num_blocks = self.count("block_count", most=MOST_LAYERS)
        num_layers = num_blocks - self.count("nextn_predict_layers", 0, least=0, most=num_blocks - 1)
        there = {match[1] for name in self.shapes if (match := _BLOCK.match(name))}
        if num_layers > len(there):
            raise self.refused("block_count", f"is {num_blocks}, but the file has tensors of {len(there)} blocks")
        return num_layers

    def unusable(self, key: str, wanted: str) -> CheckpointError:
        what = f"{self.path}: its metadata has no usable {self.architecture}.{key}: {shortened(self.get(key))}"
        return CheckpointError(f"{what}, where {wanted} is needed. {ADVICE}")

    def refused(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.architecture}.{key} {what}. {ADVICE}")
