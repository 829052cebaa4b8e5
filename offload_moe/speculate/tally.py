"""What came of the guesses of one answer."""

from dataclasses import dataclass, field

from offload_moe.speculate.guess import MOST_GUESSES


def _zeros() -> list[int]:
    return [0] * MOST_GUESSES


@dataclass(slots=True)
class Tally:
    """Counts by position, from the first guess of a pass on.

    saved_s: seconds that plain passes would have taken more for the same tokens, by their measured time; negative where
    guesses cost more than they gave. num_misses: experts that were missing beyond those of plain passes.
    """

    num_passes: int = 0  # with guesses
    guessed: list[int] = field(default_factory=_zeros)
    right: list[int] = field(default_factory=_zeros)
    saved_s: float = 0.0
    num_misses: float = 0.0

    @property
    def num_guessed(self) -> int:
        return sum(self.guessed)

    @property
    def num_right(self) -> int:
        return sum(self.right)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of the guesses at each position that were right, those behind a wrong one included; 0 to 1."""
        return tuple(right / made for right, made in zip(self.right, self.guessed, strict=True) if made)

    def gain(self, decode_s: float) -> float:
        """Speed with guesses over speed without, for an answer that took so long."""
        return (decode_s + self.saved_s) / decode_s if decode_s else 1.0

    def note(self, num_guessed: int, num_right: int, saved_s: float, num_misses: float) -> None:
        self.num_passes += 1
        for at in range(num_guessed):
            self.guessed[at] += 1
            self.right[at] += at < num_right
        self.saved_s += saved_s
        self.num_misses += num_misses
