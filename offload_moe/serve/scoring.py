"""What changes a token's score before temperature and filters, and what is said of it afterwards.

T tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from offload_moe.serve.settings import Settings


class Bias(LogitsProcessor):
    """Adds a number to the scores of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = torch.tensor([*bias], dtype=torch.long)
        self._values = torch.tensor([*bias.values()], dtype=torch.float32)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: ``[1, V]``."""
        return scores.index_add(1, self._ids.to(scores.device), self._values.to(scores)[None])


class Penalties(LogitsProcessor):
    """Lowers the scores of tokens that the answer has already: once for their presence, and once for each time."""

    def __init__(self, num_prompt: int, *, frequency: float, presence: float) -> None:
        self._num_prompt, self._frequency, self._presence = num_prompt, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: ``[1, T]``, scores: ``[1, V]``."""
        counts = torch.bincount(input_ids[0, self._num_prompt :], minlength=scores.shape[-1]).to(scores)
        return scores - self._frequency * counts - self._presence * (counts > 0)


def processors_of(settings: Settings, num_prompt: int) -> list[LogitsProcessor]:
    """Those that the generation config does not have."""
    processors: list[LogitsProcessor] = []
    if settings.frequency_penalty or settings.presence_penalty:
        penalties = Penalties(num_prompt, frequency=settings.frequency_penalty, presence=settings.presence_penalty)
        processors.append(penalties)
    if settings.logit_bias:
        processors.append(Bias(settings.logit_bias))
    return processors


class LogprobRecorder:
    """Keeps the model's own distribution until its token is known."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._row: Tensor | None = None

    def observe(self, logits: Tensor) -> None:
        """Keep the distribution of these logits, ``[1, V]``."""
        self._row = logits[0].float().log_softmax(-1)

    def of(self, token: int) -> tuple[float, Sequence[tuple[int, float]]]:
        """The token's logarithmic probability, and the likeliest tokens with theirs."""
        assert self._row is not None
        top = self._row.topk(min(self._num_top, len(self._row)))
        return float(self._row[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
