"""What else decides the next token of a request, beside the generation config.

V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import LogitsProcessor


def _ignore(logits: Tensor) -> None:
    pass


def _nothing() -> Sequence[int]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """Hooks of the step loop.

    processors: change the scores before temperature and filters, after the penalties of the generation config.
    observe: called with the model's own logits ``[1, V]`` before each choice.
    forced: called after each chosen token was taken; the tokens that must follow. They need no choice, and are computed
    in one forward, where the model continues a state by several tokens exactly. Elsewhere it is never called.
    """

    processors: Sequence[LogitsProcessor] = ()
    observe: Callable[[Tensor], None] = _ignore
    forced: Callable[[], Sequence[int]] = _nothing


NO_STEERING = Steering()
