"""The host's copy of the card's state, and the edits that make it what the next pass needs."""

import struct
from collections.abc import Sequence

from offload_moe.card.edits import Edits
from offload_moe.decode.next_token import Draw


class CardState:
    """Only what differs is edited: a token behind the one that the card chose needs no edit at all."""

    def __init__(self, edits: Edits) -> None:
        self._edits = edits
        self._known: dict[tuple[str, int], int] = {}  # by kind of edit and row
        self._num_rows: Sequence[int] = ()

    def begin(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        num_rows: Sequence[int],
        draw: Draw | None,
        moves: Sequence[tuple[int, int]],
        *,
        is_stepwise: bool,
    ) -> None:
        """Edits for a pass of these rows. num_rows: of the sequence of each. moves: as of `States.moves`."""
        self._num_rows = num_rows
        self._set("ROWS", len(ids))
        self._set("MODE", int(is_stepwise))
        for row, (token, position) in enumerate(zip(ids, positions, strict=True)):
            self._set("ADVANCE", num_rows[row], row)
            self._set("TOKEN", token, row)
            self._set_place(position, draw, row)
        for row, (read, left) in enumerate(moves):
            self._set("MOVE", read | left << 32, row)

    def choose(self, position: int, draw: Draw) -> None:
        """Edits for a choice without a pass."""
        self._set_place(position, draw, 0)

    def passed(self, chosen: Sequence[int] = ()) -> None:
        """The pass has ended, and chose these tokens, if any."""
        for row, num_rows in enumerate(self._num_rows):
            self._known["POSITION", row] += num_rows
        self.chosen(chosen)

    def chosen(self, tokens: Sequence[int]) -> None:
        """The card has put these tokens in place of those of the first rows."""
        for row, token in enumerate(tokens):
            self._known["TOKEN", row] = token

    def forget(self, *kinds: str) -> None:
        """Other edits have changed these numbers, or none named: anything may have changed."""
        for key in [key for key in self._known if not kinds or key[0] in kinds]:
            del self._known[key]

    def _set_place(self, position: int, draw: Draw | None, row: int) -> None:
        self._set("POSITION", position, row)
        if draw is not None:
            self._set("TEMPERATURE", _bits(draw.temperature), row)
            self._set("TOP_P", _bits(draw.top_p), row)
            self._set("TOP_K", draw.top_k, row)
            self._set("SEED", draw.seed, row)

    def _set(self, kind: str, value: int, row: int = 0) -> None:
        if self._known.get((kind, row)) != value:
            self._edits.add(kind, value, row)
            self._known[kind, row] = value


def _bits(number: float) -> int:
    """Of an fp32 number."""
    return int.from_bytes(struct.pack("<f", number), "little")
