"""How one model's tokens are guessed: the choice, and what its conversations share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from torch import nn

from offload_moe.decode import why_no_rows
from offload_moe.decode.hooks import hooks_of
from offload_moe.errors import ConfigError
from offload_moe.families.text_model import TextModel
from offload_moe.residency.counters import Counters
from offload_moe.speculate.choice import Choice
from offload_moe.speculate.costs import PassCosts
from offload_moe.speculate.guess import Source
from offload_moe.speculate.ngram import NgramSource
from offload_moe.speculate.speculator import Speculator

Makers = Sequence[Callable[[], Source]]  # of the sources that are used beside each other
_ATTRIBUTE = "_offload_moe_speculation"  # of a model


class Speculation:
    """Of one model. counters: its running totals. While a hook is set on the model itself, its decoder or its head, it
    sees a token at a time.

    why_off: why no tokens are guessed whatever is chosen; empty where they are.
    """

    def __init__(
        self,
        hf: TextModel,
        choice: Choice = "auto",
        counters: Counters | None = None,
        sources: Mapping[Choice, Makers] = MappingProxyType({}),
        *,
        why_off: str = "",
        is_planned: bool = True,
    ) -> None:
        """sources: what makes those of a conversation, by choice, beside and in place of what every model has.

        why_off: a reason beside those of the model. is_planned: the plan has the memory that guesses take.
        """
        self._is_planned = is_planned
        self.choice: Choice = choice
        self.why_off = why_no_rows(hf) or why_off
        self.is_paused = False
        self._costs = PassCosts()
        head = hf.get_output_embeddings()
        self._new_hooks = _NewHooks([hf, hf.get_decoder(), *([head] if isinstance(head, nn.Module) else [])])
        self.counters = Counters() if counters is None else counters
        self._sources: dict[Choice, Makers] = {"auto": (NgramSource,), "ngram": (NgramSource,), **sources}

    def conversation(self, choice: Choice | None = None) -> Speculator | None:
        """Guesses for one conversation; None where there are none. choice: None takes the model's.

        Raises: ConfigError where this source was not loaded with the model, or no memory was planned for guesses.
        """
        chosen = self.choice if choice is None else choice
        if chosen == "off" or self.why_off or self.is_paused:
            return None
        if not self._is_planned:
            raise ConfigError(
                "The model was loaded with speculate='off', so no memory was planned for the earlier states of linear "
                f"attention that guesses take. Load it with {_load_with(chosen)}, or leave that out."
            )
        if chosen not in self._sources:
            what = "a draft model" if chosen == "draft" else "its layer for multi-token prediction"
            raise ConfigError(f"The model was loaded without {what}. Load it with {_load_with(chosen)}.")
        source, *beside = (make() for make in self._sources[chosen])
        return Speculator(source, self._costs, self.counters, beside=beside, may_guess=lambda: not self._new_hooks)

    @property
    def may_share(self) -> bool:
        """Whether a pass may have tokens of several conversations now."""
        return not self.why_off and not self.is_paused and not self._new_hooks

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Answers that begin meanwhile make no guesses."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False


def speculation_of(hf: TextModel) -> Speculation:
    """What `set_speculation` gave a model, or the default."""
    if _ATTRIBUTE not in vars(hf):
        set_speculation(hf, Speculation(hf))
    found: Speculation = vars(hf)[_ATTRIBUTE]
    return found


def set_speculation(hf: TextModel, speculation: Speculation) -> None:
    """How the tokens of a model are guessed from now on."""
    setattr(hf, _ATTRIBUTE, speculation)


class _NewHooks:
    """Hooks of some modules that were not there at first."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._registries = [(hooks, set(hooks)) for hooks in hooks_of(modules)]

    def __bool__(self) -> bool:
        return any(hooks.keys() - known for hooks, known in self._registries)


def _load_with(choice: Choice) -> str:
    """What a program, or a user of the command line, sets at load."""
    return f"speculate={choice!r} (--speculate {choice})"
