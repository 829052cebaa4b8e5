"""A trace as a workload of the runtime: prompts in chunks, then tokens one by one.

T tokens, L MoE layers, K top-k.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload_moe.errors import ConfigError
from offload_moe.profile.trace import Trace

PROMPT_TOKENS = 64  # prompt tokens of a sequence, in a trace without prompts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """prompt: ``[T, L, K]``, may have no tokens; decode: ``[T, L, K]``, one token after another."""

    prompt: NDArray[Any]
    decode: NDArray[Any]


def answers_of(trace: Trace, *, prompt_tokens: int | None = None, num_tokens: int | None = None) -> list[Answer]:
    """One workload per sequence. prompt_tokens: None takes the trace's own, or 64, at most half of the sequence.

    num_tokens: limit of all decoded tokens; None takes all.

    Raises: ConfigError when no token would be decoded.
    """
    left = trace.num_tokens if num_tokens is None else num_tokens
    answers = []
    for start, length in _sequences(trace):
        if left <= 0:
            break
        split = start + min(length, _prompt_length(trace, start, length, prompt_tokens))
        end = min(start + length, split + left)
        answers.append(Answer(prompt=trace.experts[start:split], decode=trace.experts[split:end]))
        left -= end - split
    if not any(len(answer.decode) for answer in answers):
        raise ConfigError("The trace holds only prompts, so no token would be decoded. Set a smaller --prompt-tokens.")
    return answers


def _sequences(trace: Trace) -> Iterator[tuple[int, int]]:
    start = 0
    for length in np.asarray(trace.sequence_lengths).tolist():
        if length:
            yield start, length
        start += length


def _prompt_length(trace: Trace, start: int, length: int, chosen: int | None) -> int:
    if chosen is not None:
        return chosen
    if trace.is_prompt is None:
        return min(PROMPT_TOKENS, length // 2)
    return int(trace.is_prompt[start : start + length].sum())
