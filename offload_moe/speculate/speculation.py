"""How one model's tokens are guessed: the choice, and what its conversations share."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from offload_moe.decode import why_no_rows
from offload_moe.errors import ConfigError
from offload_moe.residency.counters import Counters
from offload_moe.speculate.choice import Choice
from offload_moe.speculate.costs import PassCosts
from offload_moe.speculate.guess import Source
from offload_moe.speculate.ngram import NgramSource
from offload_moe.speculate.speculator import Speculator


class Speculation:
    """Of one model. counters: its running totals.

    why_off: why no tokens are guessed whatever is chosen; empty where they are.
    """

    def __init__(self, hf: PreTrainedModel, choice: Choice = "auto", counters: Counters | None = None) -> None:
        self.choice: Choice = choice
        self.why_off = why_no_rows(hf)
        self.is_paused = False
        self._costs = PassCosts()
        self._counters = Counters() if counters is None else counters
        self._sources: dict[Choice, Callable[[], Source]] = {"auto": NgramSource, "ngram": NgramSource}

    def conversation(self, choice: Choice | None = None) -> Speculator | None:
        """Guesses for one conversation; None where there are none. choice: None takes the model's.

        Raises: ConfigError where this source was not loaded with the model.
        """
        chosen = self.choice if choice is None else choice
        if chosen == "off" or self.why_off or self.is_paused:
            return None
        if chosen not in self._sources:
            raise ConfigError(f"The model was loaded without {chosen} guesses. Load it with speculate={chosen!r}.")
        return Speculator(self._sources[chosen](), self._costs, self._counters)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Answers that begin meanwhile make no guesses."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False


_SPECULATIONS: WeakKeyDictionary[PreTrainedModel, Speculation] = WeakKeyDictionary()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_SPECULATIONS.clear)  # computing threads exist only in the parent


def speculation_of(hf: PreTrainedModel) -> Speculation:
    """What `set_speculation` gave a model, or the default."""
    found = _SPECULATIONS.get(hf)
    return _SPECULATIONS.setdefault(hf, Speculation(hf)) if found is None else found


def set_speculation(hf: PreTrainedModel, speculation: Speculation) -> None:
    """How the tokens of a model are guessed from now on."""
    _SPECULATIONS[hf] = speculation
