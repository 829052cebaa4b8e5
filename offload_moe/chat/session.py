"""A conversation with a model: its messages, its cache, one answer at a time."""

import atexit
import threading
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Unpack
from weakref import WeakSet

import torch
from transformers import PreTrainedTokenizerBase

from offload_moe.chat.answer import Answer
from offload_moe.chat.chat_template import Message
from offload_moe.chat.prefix import PrefixCache
from offload_moe.chat.reasoning import Piece, split_unfinished
from offload_moe.chat.sampling import NUM_SEEDS, Sampling, SamplingArguments
from offload_moe.chat.stats import TurnStats
from offload_moe.chat.template import PromptFormat
from offload_moe.chat.transcript import check_messages, read_transcript, write_transcript
from offload_moe.errors import BudgetError, ConfigError
from offload_moe.families.text_model import TextModel
from offload_moe.plan.room import ContextRoom
from offload_moe.residency.counters import Counters

_answers: WeakSet[Generator[Piece | None, None, None]] = WeakSet()


class ChatSession:
    """One conversation. Earlier turns stay in the key/value cache and are not computed again.

    `counters` are the model's running totals and `memory` its present use in bytes, for the statistics of each answer.
    `room` limits the length of the conversation. `raw` continues the text instead of answering it. `notice` is a
    message to show before the first answer. Sessions of one model take turns, a token or a part of a prompt each.
    """

    def __init__(
        self,
        hf: TextModel,
        tokenizer: PreTrainedTokenizerBase | None,
        counters: Counters | None = None,
        *,
        memory: Callable[[], Mapping[str, int]] | None = None,
        room: ContextRoom | None = None,
        system: str | None = None,
        raw: bool = False,
    ) -> None:
        self.system = system
        self.messages: list[Message] = []
        self.last_stats: TurnStats | None = None
        self._hf = hf
        self._format = PromptFormat(hf, tokenizer, raw=raw)
        self._prefix = PrefixCache(hf)
        self._counters = counters
        self._memory = memory
        self._room = room
        self._withdrawn_message: Message | None = None
        self._num_retries = 0
        self._answer_in_progress: Answer | None = None
        self.notice = self._format.notice
        if self.notice is not None:
            warnings.warn(self.notice, UserWarning, stacklevel=2)

    @property
    def withdrawn(self) -> str | None:
        """The last message, if its answer never began; `retry` sends it again."""
        return self._withdrawn_message["content"] if self._withdrawn_message is not None else None

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """Prompt tokens computed and to be computed of the answer in progress; (0, 0) where there is none."""
        answer = self._answer_in_progress
        return answer.prompt_progress if answer is not None else (0, 0)

    def send(
        self,
        message: str | Sequence[Mapping[str, str]],
        *,
        stop_event: threading.Event | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> Generator[Piece, None, None]:
        """Stream the answer to one more user message, or to a whole conversation that replaces this one.

        A conversation that ends with an assistant message is continued there: the stream is what follows it, and the
        session keeps both as one message. An empty one is left out.

        Closing the iterator, or an interrupt, stops the model and keeps the text so far. A message whose answer had
        not begun is withdrawn; `retry` sends it again.

        Raises:
            ConfigError: a setting is out of range, or the prompt is longer than the model's context.
            BudgetError: the prompt does not fit in memory, or the device ran out of memory.
        """
        return _pieces(self.steps(message, stop_event=stop_event, **sampling))

    def steps(
        self,
        message: str | Sequence[Mapping[str, str]],
        *,
        stop_event: threading.Event | None = None,
        **sampling: Unpack[SamplingArguments],
    ) -> Generator[Piece | None, None, None]:
        """As `send`, with None behind each token and each part of the prompt, for callers that alternate answers.

        Raises: ConfigError, BudgetError.
        """
        settings = Sampling.of(sampling)
        if isinstance(message, str):
            messages = [*self.messages, {"role": "user", "content": message}]
        else:
            messages = check_messages(message, "conversation")
            if messages and messages[0]["role"] == "system":
                self.system = messages.pop(0)["content"]
            if not messages:
                raise ConfigError("The conversation has no message to answer.")
        self._num_retries = 0
        return self._begin(messages, settings, stop_event)

    def retry(
        self, *, stop_event: threading.Event | None = None, **sampling: Unpack[SamplingArguments]
    ) -> Generator[Piece, None, None]:
        """Answer the last user message again. With a seed, each retry draws differently and repeatably.

        Raises:
            ConfigError: there is nothing to answer again.
        """
        settings = Sampling.of(sampling)
        messages = list(self.messages)
        if self._withdrawn_message is not None:
            messages.append(self._withdrawn_message)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ConfigError("There is no answer to retry yet.")
        self._num_retries += 1
        if settings.seed is not None:
            settings = replace(settings, seed=(settings.seed + self._num_retries) % NUM_SEEDS)
        return _pieces(self._begin(messages, settings, stop_event))

    def reset(self) -> None:
        """Drop the conversation and its cache; the system prompt stays."""
        self.messages, self._withdrawn_message, self.last_stats = [], None, None
        self._prefix.clear()

    def save(self, path: str | Path) -> None:
        """Write the conversation to a JSON file, whole or not at all. Raises: ConfigError, see `write_transcript`."""
        write_transcript(Path(path), system=self.system, messages=self.messages)

    def load(self, path: str | Path) -> None:
        """Replace the conversation by a saved one; on an error the present one stays.

        Raises: ConfigError, see `read_transcript`.
        """
        self.system, self.messages = read_transcript(Path(path))
        self._withdrawn_message = None

    def _begin(
        self, messages: list[Message], sampling: Sampling, stop_event: threading.Event | None
    ) -> Generator[Piece | None, None, None]:
        answer = self._answer(messages, sampling, stop_event)
        _answers.add(answer)
        return answer

    def _answer(
        self, messages: list[Message], sampling: Sampling, stop_event: threading.Event | None
    ) -> Generator[Piece | None, None, None]:
        prompt = messages if self.system is None else [{"role": "system", "content": self.system}, *messages]
        before = self._counters.copy() if self._counters is not None else None
        speculator = self._prefix.guessing.speculator(sampling.speculate)
        answer = Answer(self._hf, self._format, self._prefix, prompt, sampling, stop_event, self._room, speculator)
        self._answer_in_progress = answer
        try:
            yield from answer.steps()
        except torch.OutOfMemoryError as error:
            raise BudgetError(
                f"Out of device memory at {answer.num_tokens:,} tokens of context. Leave more room: a smaller --vram, "
                "a shorter conversation (/reset), or fewer new tokens."
            ) from error
        finally:
            self._answer_in_progress = None
            self._keep(messages, answer)
            used = self._counters.since(before) if self._counters is not None and before is not None else None
            room = self._room
            self.last_stats = answer.stats(
                used,
                self._memory() if self._memory is not None else {},
                num_slots_given_up=room.num_slots_given_up if room is not None else 0,
                num_slots_lost=room.num_slots_lost if room is not None else 0,
            )
            if self._counters is not None:
                self.last_stats.add_tokens_to(self._counters)

    def _keep(self, messages: list[Message], answer: Answer) -> None:
        self.messages = messages
        if answer.text or answer.reasoning or answer.finish != "interrupted":
            self._withdrawn_message = None
            said, reasoning = {"role": "assistant", "content": answer.text}, answer.reasoning
            if messages[-1]["role"] == "assistant":
                *messages, begun = messages
                text, thought, _ = split_unfinished(begun["content"])
                said = begun | {"content": text + answer.text}
                reasoning = begun.get("reasoning_content", "") + thought + reasoning
            if reasoning:
                # The name that chat templates use; most drop it from earlier turns.
                said["reasoning_content"] = reasoning
            self.messages = [*messages, said]
        elif messages[-1]["role"] == "user":
            # Two user messages in a row are refused by many templates.
            *self.messages, self._withdrawn_message = messages


def _pieces(steps: Generator[Piece | None, None, None]) -> Generator[Piece, None, None]:
    with closing(steps):
        yield from (piece for piece in steps if piece is not None)


@atexit.register
def _close_answers() -> None:
    """Close answers that are still referenced: later in the exit, the modules that closing needs are gone."""
    for answer in list(_answers):
        with suppress(ValueError):  # another thread executes it
            answer.close()
