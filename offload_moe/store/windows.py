"""Where the parts of a record that lie apart in files are read into a slot: in windows that direct reads allow.

Each window begins and ends on 4096 bytes, in the file and in the slot. The parts are moved down to their places when
all have arrived, the lowest first, so no window lies below the place of its part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offload_moe.quant.layout import RECORD_ALIGNMENT, round_up


@dataclass(frozen=True, slots=True)
class Window:
    """One part of a record: `length` bytes, `skew` bytes behind `offset` of a file, which belong at `target`.

    start, num_bytes: of the whole window in the slot.
    """

    path: Path
    offset: int
    start: int
    num_bytes: int
    skew: int
    length: int
    target: int

    @property
    def end(self) -> int:
        """Where it ends in the slot."""
        return self.start + self.num_bytes


def window_starts(parts: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Where windows begin in a slot for parts of any skew, and the bytes of the slot.

    parts: target and length of each, ascending.
    """
    starts, end = [], 0
    for target, length in parts:
        starts.append(max(end, round_up(target, RECORD_ALIGNMENT)))
        end = starts[-1] + round_up(length + RECORD_ALIGNMENT - 1, RECORD_ALIGNMENT)
    return starts, end


def window(path: Path, offset: int, length: int, start: int, target: int) -> Window:
    """The window for `length` bytes at `offset` of a file."""
    skew = offset % RECORD_ALIGNMENT
    return Window(path, offset - skew, start, round_up(skew + length, RECORD_ALIGNMENT), skew, length, target)
