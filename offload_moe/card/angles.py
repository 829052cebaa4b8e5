"""Tables of rotary angles on the card, by position.

D rotated dims.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch

from offload_moe.card.model import DecoderParts
from offload_moe.decode.rotary import RotaryTable

AT_ONCE = 4096  # positions


class Angles:
    """cos and signed sin ``[positions, D]``, which stay where they are.

    Of a model that rotates by the length of the sequence, too, they are those of sequences as long as the last one.
    """

    def __init__(self, parts: DecoderParts, num_positions: int, device: torch.device) -> None:
        """Of the first positions. Raises: Uncovered where the embedding is of other dims than the layers rotate."""
        rotated = {layer.spec.attention.rotated_dims for layer in parts.layers if layer.spec.attention.rotary != "none"}
        self.num_positions, self._wiring, self._keeper = num_positions, parts.wiring, parts.rotation
        self._rotary: RotaryTable | None = None
        shape = (1, 1)
        if rotated:
            (dims,) = rotated
            self._rotary, shape = parts.wiring.step_rotary(dims), (num_positions, dims)
        self.cos, self.signed_sin = (torch.zeros(shape, device=device) for _ in range(2))
        self._factors: tuple[int, ...] | None = None
        self.turn(1)

    def takes(self, length: int) -> bool:
        """Whether sequences of this length have angles that later ones have, too."""
        growing = () if self._keeper is None else self._keeper.rotation.growing
        return length <= self.num_positions and all(self._length(length) <= window for window in growing)

    def are_of(self, length: int) -> bool:
        """Whether the tables are those of a sequence of this length."""
        return self._factors == self._factors_of(length)

    @torch.inference_mode()
    def turn(self, length: int) -> None:
        """Make them those of a sequence of this length; no pass may be under way."""
        self._factors = self._factors_of(length)
        if self._keeper is None:
            self._fill()
        else:
            with self._keeper.whole_sequence_of(self._length(length)):
                self._fill()

    def _fill(self) -> None:
        for first, end in self._ranges() if self._rotary is not None else ():
            positions = torch.arange(first, end, device=self.cos.device)[None]
            assert self._rotary is not None
            found = self._rotary.prepare(self._wiring.embed_positions(positions))
            for table, part in zip((self.cos, self.signed_sin), found, strict=True):
                table[first:end] = part.reshape(end - first, -1)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Of positions that have the same angles alone and together: cut where other factors begin."""
        rotation = None if self._keeper is None else self._keeper.rotation
        windows = () if rotation is None else (*rotation.switching, *rotation.growing)
        cuts = {*range(0, self.num_positions, AT_ONCE), *(each for each in windows if each < self.num_positions)}
        ordered = [*sorted(cuts), self.num_positions]
        yield from pairwise(ordered)

    def _length(self, length: int) -> int:
        return length if self._keeper is None else max(length, self._keeper.final_length)

    def _factors_of(self, length: int) -> tuple[int, ...]:
        return () if self._keeper is None else self._keeper.rotation.factors(self._length(length))
