"""How many guesses pay, from how often they were right and from what each row costs.

With k guesses a pass gives 1 + p(1) + p(1) p(2) + ... tokens, where p(i) is how often guess i was right if those before
it were, and takes `PassCosts.ratio(1 + k)` times as long as a plain one.
"""

from collections.abc import Sequence

from offload_moe.speculate.balance import CREDIT, Balance
from offload_moe.speculate.costs import PassCosts
from offload_moe.speculate.guess import MOST_GUESSES

FORGET = 0.1  # weight of the newest guess, of those that are all compared
FORGET_TRIED = 0.2  # of guesses that are compared only where they are computed
LEAST_GAIN = 1.05  # expected, so that noise does not switch guessing on
CALIBRATE_AFTER = 64  # passes with guesses, then a plain one is measured
RETRY_AFTER = 32  # tokens, for guesses that are compared only where they are computed


class Governor:
    """Of one conversation. costs: of the model."""

    def __init__(self, costs: PassCosts, certainties: Sequence[float], *, is_free: bool) -> None:
        """certainties, is_free: see `Source`."""
        self._costs, self._is_free = costs, is_free
        self._forget = FORGET if is_free else FORGET_TRIED
        self._certainty = [[each] * MOST_GUESSES for each in certainties]  # p by kind and position
        self._guess_ratio = 0.0  # seconds of making one guess, over those of a plain pass
        self._token_ratio = 0.0  # of catching up with one token, likewise
        self._balance = Balance()
        self._since_plain = 0
        self._since_guess = 0

    def choose(self, kind: int, most: int, num_behind: int = 0) -> int:
        """How many guesses of this kind to compute, 0 for none. num_behind: see `StateSource`."""
        costs, most = self._costs, self._covered(most, num_behind)
        if not most or not costs.plain_s or self._since_plain >= CALIBRATE_AFTER or costs.is_stale:
            return 0
        rates = self._rates(kind, most)
        best = max(range(most), key=rates.__getitem__)
        if rates[best] >= LEAST_GAIN:
            return best + 1
        is_old = not self._is_free and self._since_guess >= RETRY_AFTER  # what is known of these guesses
        return 1 if is_old else 0

    def rate(self, kind: int, num_guesses: int) -> float:
        """Expected tokens per time of a plain pass."""
        return self._rates(kind, num_guesses)[-1]

    def score(self, kind: int, num_right: int, num_guesses: int) -> None:
        """Of so many guesses of one kind the first `num_right` were right, and the next was not."""
        certainty = self._certainty[kind]
        for at in range(min(num_right + 1, num_guesses)):
            certainty[at] += self._forget * ((at < num_right) - certainty[at])

    def note_plain(self, spent: float) -> None:
        """A pass without guesses gave a token, and took as long as so many usual ones."""
        self._balance.note(1, spent)
        self._since_plain = 0
        self._since_guess += 1

    def note_guesses(self, num_right: int, seconds: float, *, num_new: int = 1) -> float:
        """A pass with guesses, which gave one token more than were right. Returns the seconds that it saved.

        seconds: with those of making the guesses, and of catching up before. num_new: rows that the pass would have had
        without guesses.
        """
        plain_s, num_passes = self._costs.plain_s, self._costs.ratio(num_new) + num_right
        if plain_s:
            self._balance.note(num_passes, seconds / plain_s)
        self._since_plain += 1
        if not num_right:  # else the next are tried at once
            self._since_guess = 0
        return num_passes * plain_s - seconds

    def note_making(self, num_guesses: int, seconds: float) -> None:
        """So many guesses were made in this time, without that of catching up."""
        self._guess_ratio = self._nearer(self._guess_ratio, num_guesses, seconds)

    def note_catching_up(self, num_tokens: int, seconds: float) -> None:
        """The source has computed so many tokens in this time."""
        self._token_ratio = self._nearer(self._token_ratio, num_tokens, seconds)

    def _nearer(self, ratio: float, number: int, seconds: float) -> float:
        """A ratio to a plain pass, nearer to that of one of `number` things; the first is taken as it is."""
        if not number or not self._costs.plain_s:
            return ratio
        return ratio + (FORGET_TRIED if ratio else 1.0) * (seconds / number / self._costs.plain_s - ratio)

    def _covered(self, most: int, num_behind: int) -> int:
        """How many guesses may all be wrong: the balance covers their loss.

        One may be while anything is left of it, if catching up takes no more than what is left and a credit.
        """
        left = self._balance.left
        if left < 0 or num_behind * self._token_ratio > left + CREDIT:
            return 0
        while most > 1 and self._costs.ratio(1 + most) - 1 + most * self._guess_ratio > left:
            most -= 1
        return most

    def _rates(self, kind: int, most: int) -> list[float]:
        """Expected tokens per time of a plain pass, with 1, 2, ... guesses."""
        tokens, all_right, rates = 1.0, 1.0, []
        for num_guesses, certainty in enumerate(self._certainty[kind][:most], 1):
            all_right *= certainty
            tokens += all_right
            rates.append(tokens / (self._costs.ratio(1 + num_guesses) + num_guesses * self._guess_ratio))
        return rates


class EveryGuess(Governor):
    """Computes every guess, for measurements."""

    def __init__(self) -> None:
        super().__init__(PassCosts(), (0.0,), is_free=False)

    def choose(self, kind: int, most: int, num_behind: int = 0) -> int:
        return most
