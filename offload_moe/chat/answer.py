"""One answer in progress: prompt, tokens, text, reasoning, and its statistics afterwards."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial

from transformers import GenerationConfig

from offload_moe.chat.chat_template import Message, unfinished
from offload_moe.chat.generation import Generation, TokenRequest
from offload_moe.chat.prefix import PrefixCache
from offload_moe.chat.reasoning import Piece, make_splitter
from offload_moe.chat.sampling import Sampling
from offload_moe.chat.stats import Finish, TurnStats
from offload_moe.chat.template import PromptFormat
from offload_moe.chat.text import IncrementalText
from offload_moe.families.text_model import TextModel
from offload_moe.plan.room import ContextRoom
from offload_moe.residency.counters import Counters
from offload_moe.speculate.speculator import Speculator

CONTEXT_TOKENS = 8  # of the prompt, which the text of the first token depends on


class Answer:
    """One answer. The constructor renders the prompt, checks it and matches it with the cache; `pieces` computes.

    Raises:
        ConfigError: the prompt does not fit in the model's context.
        BudgetError: the prompt does not fit in memory.
    """

    def __init__(
        self,
        hf: TextModel,
        prompt_format: PromptFormat,
        prefix: PrefixCache,
        messages: Sequence[Message],
        sampling: Sampling,
        stop_event: threading.Event | None = None,
        room: ContextRoom | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self.text = ""
        self.reasoning = ""
        self.finish: Finish = "interrupted"
        self._format = prompt_format
        self._messages = messages
        self._prompt = prompt_format.render(messages)
        self._ids = prompt_format.encode(self._prompt)
        request = TokenRequest(
            ids=self._ids,
            boundary=lambda: prompt_format.boundary(messages, self._ids),
            make_config=partial(_config, hf, sampling, prompt_format),
            stop_ids=prompt_format.stop_ids,
            tokenizer=prompt_format.tokenizer,
            max_new_tokens=sampling.max_new_tokens,
            seed=sampling.seed,
            speculator=speculator,
        )
        self._generation = Generation(hf, prefix, request, stop_event=stop_event, room=room)

    @property
    def ids(self) -> list[int]:
        """Of the prompt and the answer so far."""
        return [*self._ids, *self._generation.tokens]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the answer so far."""
        return len(self._ids) + len(self._generation.tokens)

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """Prompt tokens computed so far, and to be computed in all."""
        return self._generation.prompt_progress

    def steps(self) -> Iterator[Piece | None]:
        """Yield the answer piece by piece, and None behind each step: a part of the prompt, or a token.

        Closing the iterator stops the model; the cache stays consistent.
        """
        with closing(self._generation.steps()) as steps:
            for piece in self._split(steps):
                if piece is None:
                    yield None
                    continue
                if piece.kind == "answer":
                    self.text += piece.text
                else:
                    self.reasoning += piece.text
                yield piece

    def stats(
        self,
        counters: Counters | None,
        memory_bytes: Mapping[str, int],
        *,
        num_slots_given_up: int = 0,
        num_slots_lost: int = 0,
    ) -> TurnStats:
        """Tokens, seconds and bytes (by part of memory) of the ended answer. counters: of the tiers, of this answer."""
        generation = self._generation
        return TurnStats(
            num_prompt_tokens=len(self._ids),
            num_reused_tokens=generation.num_reused,
            reuse=generation.reuse,
            prompt_s=generation.prompt_s,
            num_decode_tokens=len(generation.tokens),
            decode_s=generation.decode_s,
            finish=self.finish,
            counters=counters,
            memory_bytes=dict(memory_bytes),
            num_slots_given_up=num_slots_given_up,
            num_slots_lost=num_slots_lost,
            crossed_window=generation.crossed_window,
            guesses=generation.guesses,
        )

    def _split(self, steps: Iterable[int | None]) -> Iterator[Piece | None]:
        tokenizer, special_tokens = self._format.tokenizer, self._format.special_tokens
        splitter = make_splitter(
            template=self._format.template, prompt=self._prompt, unfinished=unfinished(self._messages)
        )
        text = IncrementalText(tokenizer, self._ids[-CONTEXT_TOKENS:])
        is_stopped_by_model = False
        for token in steps:
            if is_stopped_by_model := token in self._format.stop_ids:
                break
            if token is None:
                pass
            elif (special := special_tokens.get(token)) is not None:
                yield from splitter.text(text.flush())
                yield from splitter.marker(special)
            else:
                yield from splitter.text(text.push(token))
            yield None
        yield from splitter.text(text.flush())
        yield from splitter.flush()
        self.finish = self._finish(is_stopped_by_model)

    def _finish(self, is_stopped_by_model: bool) -> Finish:
        generation = self._generation
        if not is_stopped_by_model and len(generation.tokens) >= generation.max_new_tokens:
            return generation.end
        return "interrupted" if generation.is_stopped and not is_stopped_by_model else "stop"


def _config(hf: TextModel, sampling: Sampling, prompt_format: PromptFormat, max_new_tokens: int) -> GenerationConfig:
    return sampling.generation_config(hf, stop_ids=prompt_format.stop_ids, max_new_tokens=max_new_tokens)
