"""The guesses of one conversation, over all its answers."""

from offload_moe.families.text_model import TextModel
from offload_moe.speculate.choice import Choice
from offload_moe.speculate.speculation import speculation_of
from offload_moe.speculate.speculator import Speculator


class Guessing:
    """Keeps what was learned from one answer for the next, as long as the choice stays the same."""

    def __init__(self, hf: TextModel) -> None:
        self._hf = hf
        self._made: tuple[Choice, Speculator | None] = "off", None

    def speculator(self, chosen: Choice | None = None) -> Speculator | None:
        """For the next answer; None where nothing is guessed. chosen: None takes the model's choice.

        Raises: ConfigError, see `Speculation.conversation`.
        """
        speculation = speculation_of(self._hf)
        choice, (before, speculator) = chosen or speculation.choice, self._made
        if speculator is None or choice != before:
            speculator = speculation.conversation(choice)
            self._made = choice, speculator
        return speculator if not speculation.is_paused else None
