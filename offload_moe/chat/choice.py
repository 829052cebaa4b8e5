"""How a request chooses its tokens: on the card, where its pass can, else from logits by transformers' processors.

V vocabulary.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offload_moe.chat.steering import NO_STEERING, Steering
from offload_moe.chat.top_p import TopP
from offload_moe.decode.next_token import Draw, TokenPass
from offload_moe.errors import CheckpointError, ConfigError, OffloadMoeError

# What a pass gives behind a token: logits ``[1, V]``, or the next token, which the card has chosen.
Found = Tensor | int
Process = Callable[[Tensor, Tensor], Tensor]
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)  # in the order in which the card applies them
NUM_SEEDS = 2**62  # that torch draws from


class Choice:
    """Of one request. draw: how the card chooses; None where transformers does."""

    def __init__(
        self,
        processors: LogitsProcessorList,
        steering: Steering,
        token_pass: TokenPass | None,
        *,
        is_sampled: bool,
        seed: int | None,
        device: torch.device,
    ) -> None:
        """token_pass: of the model, where the request's tokens may go through it.

        seed: None takes torch's own random numbers.
        """
        self._processors = [TopP(each) if type(each) is TopPLogitsWarper else each for each in processors]
        self._observe = steering.observe
        self._is_sampled, self._token_pass = is_sampled, token_pass
        self.draw: Draw | None = None
        self._random: torch.Generator | None = None
        if token_pass is not None and steering.observe is NO_STEERING.observe:
            self.draw = _draw(processors, is_sampled=is_sampled, seed=seed)
        if self.draw is None and seed is not None:
            self._random = torch.Generator(device).manual_seed(seed)

    def choose(self, ids: Callable[[], Tensor], num_tokens: int, found: Found) -> int:
        """The next token. ids: gives the sequence ``[1, S]``; num_tokens: S."""
        token_pass = self._token_pass
        if token_pass is None:
            assert isinstance(found, Tensor)
            return self._choose(ids, found)
        if isinstance(found, int):
            token_pass.count()
            return found
        if self.draw is not None and self._is_sampled:
            token_pass.count()
            return token_pass.choose(found, num_tokens - 1, self.draw)
        began = time.perf_counter()
        token = self._choose(ids, found)
        token_pass.count(time.perf_counter() - began)
        return token

    def _choose(self, ids: Callable[[], Tensor], logits: Tensor) -> int:
        self._observe(logits)
        scores = logits
        for process in self._processors:  # calling the list itself inspects each one's signature, every time
            scores = process(ids(), scores)
        if self._is_sampled:
            probabilities = scores.softmax(-1)
            if bool(probabilities[0, 0].isnan()):  # then all are
                raise _no_choice(logits)
            return drawn(probabilities, self._random)
        token = int(scores.argmax(-1))
        if not bool(scores[0, token] > -torch.inf):
            raise _no_choice(logits)
        return token


def _no_choice(logits: Tensor) -> OffloadMoeError:
    """Why no token of ``[1, V]`` can be chosen."""
    if bool((logits.isnan() | (logits == torch.inf)).any()):
        return CheckpointError(
            "The model gave logits that are NaN or infinite, so no token can be chosen from them. Check its files with "
            "`offload-moe verify`; a model that was trained in bf16 may need --dtype fp32."
        )
    return ConfigError(
        "No token may follow: the settings of this answer forbid every token. Relax its filters or grammar."
    )


def drawn(probabilities: Tensor, seeded: torch.Generator | None) -> int:
    """One of ``[1, V]`` by transformers' draw for a seed, and without one by a single one of torch's random numbers."""
    if seeded is None and probabilities.is_cpu:  # a card's sums are not ascending to the last bit
        sums = probabilities[0].cumsum(0)  # in fp32: greater blocks than a megabyte are mapped anew each time
        point = (1 - torch.rand(())) * sums[-1]  # above 0: what has no probability is not found
        return int(torch.searchsorted(sums, point))
    return int(torch.multinomial(probabilities, num_samples=1, generator=seeded))


def _draw(processors: Sequence[LogitsProcessor], *, is_sampled: bool, seed: int | None) -> Draw | None:
    """What the card does in place of these processors; None where it cannot."""
    kinds = [type(process) for process in processors]
    if not is_sampled:
        return None if kinds else Draw()
    if kinds != [kind for kind in WARPERS if kind in kinds]:
        return None
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    for process in processors:
        settings |= {name: value for name, value in vars(process).items() if name in settings}
    drawn = int(torch.randint(NUM_SEEDS, ())) if seed is None else seed
    return Draw(
        temperature=float(settings["temperature"]),
        top_k=int(settings["top_k"]),
        top_p=float(settings["top_p"]),
        seed=drawn,
    )
