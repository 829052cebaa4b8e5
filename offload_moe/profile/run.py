"""Running prompts on a loaded model during a recording."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch

from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.families.text_model import TextModel
from offload_moe.profile.prompts import GroupedPrompt
from offload_moe.profile.recall import measure_recall
from offload_moe.profile.recorder import Recorder
from offload_moe.profile.text import classes_of
from offload_moe.profile.trace import Trace
from offload_moe.system.progress import Progress

MAX_NEW_TOKENS = 64
RECALL_TOKENS = 24


class Recordable(Protocol):
    """What is needed of `offload_moe.engine.model.Model`."""

    hf: TextModel
    tokenizer: Any

    @property
    def layers(self) -> Sequence[ExpertsModule]: ...

    def trace(self) -> AbstractContextManager[Recorder]: ...

    @property
    def stream(self) -> Callable[..., Iterator[str]]: ...


def run_prompts(
    model: Recordable, prompts: Sequence[GroupedPrompt], *, max_new_tokens: int = MAX_NEW_TOKENS, progress: Progress
) -> Trace:
    """Answer every prompt greedily and return the trace, with text classes and lookahead recall.

    The first prompt is answered once beforehand, so that one-time costs of the process are not counted.
    """
    is_raw = getattr(model.tokenizer, "chat_template", None) is None
    progress("Warming up", 0.0)
    _answer(model, prompts[0], 4, is_raw=is_raw)
    with model.trace() as recorder:
        for number, prompt in enumerate(prompts):
            progress("Recording", number / len(prompts))
            recorder.group = prompt.group
            _answer(model, prompt, max_new_tokens, is_raw=is_raw)
    trace = recorder.trace()
    progress("Measuring lookahead", 0.0)
    return add_metadata(
        trace,
        token_classes={} if model.tokenizer is None else classes_of(model.tokenizer, _ids(trace)),
        lookahead_recall=_recall(model, trace),
    )


def add_metadata(trace: Trace, **values: Any) -> Trace:
    return replace(trace, metadata=json.dumps(json.loads(trace.metadata) | values))


def _answer(model: Recordable, prompt: GroupedPrompt, max_new_tokens: int, *, is_raw: bool) -> None:
    for _ in model.stream(prompt.text, raw=is_raw, temperature=0, max_new_tokens=max_new_tokens):
        pass


def _ids(trace: Trace) -> list[int]:
    assert trace.token_ids is not None
    ids: list[int] = trace.token_ids.tolist()
    return ids


def _recall(model: Recordable, trace: Trace) -> dict[str, list[float | None]]:
    """Measure the recall on the beginning of the longest recorded sequence, in one forward."""
    ends = trace.sequence_lengths.cumsum()
    longest = int(trace.sequence_lengths.argmax())
    start = int(ends[longest] - trace.sequence_lengths[longest])
    ids = _ids(trace)[start : min(int(ends[longest]), start + RECALL_TOKENS)]

    def forward() -> Trace:
        with model.trace() as recorder, torch.inference_mode():
            model.hf(input_ids=torch.tensor([ids], device=model.hf.device), use_cache=False)
        return recorder.trace()

    return measure_recall(model.hf, model.layers, forward)
