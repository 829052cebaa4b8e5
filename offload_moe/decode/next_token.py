"""The next token of a sequence by a pass that has the output head, and may choose, too.

T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from offload_moe.decode.hooks import Bypass
from offload_moe.families.text_model import TextModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How a pass chooses tokens: by temperature, then top-k, then top-p, by a random number of seed and position.

    A temperature of 0 takes the greatest logit; a top_k of 0 and a top_p of 1 leave none out.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(slots=True)
class Wanted:
    """What a forward of the decoder shall give beside its hidden state, as argument `wanted`: logits, or with a draw
    the tokens chosen from them.

    logits: fp32 ``[T, V]``, valid until the next pass. Neither is set where the decoder's modules took the tokens.
    """

    draw: Draw | None = None
    logits: Tensor | None = None
    tokens: Sequence[int] = ()


class TokenPass(Protocol):
    """The pass of a decoder whose forward takes `wanted`."""

    @property
    def is_clear(self) -> bool:
        """Whether the head may be passed by: nothing observes it or the model, or has replaced their forwards."""

    def choose(self, logits: Tensor, position: int, draw: Draw) -> int:
        """Choose from logits ``[1, V]`` behind a position, as a pass does."""

    def count(self, choice_s: float | None = None) -> None:
        """Count a token that it has chosen; or that was chosen elsewhere from its logits, in so many seconds."""


def token_pass_of(hf: TextModel) -> TokenPass | None:
    """The pass of a model; None where its head is not in it."""
    forward = vars(hf.get_decoder()).get("forward")
    found: TokenPass | None = getattr(forward, "token_pass", None)
    return found


def head_alone_of(hf: TextModel) -> Bypass | None:
    """While it is clear, the head behind the decoder gives the model's logits, without the model's own forward.

    None where it does not, or that is not known.
    """
    forward = vars(hf.get_decoder()).get("forward")
    found: Bypass | None = getattr(forward, "head_alone", None)
    return found
