"""One answer in progress: prompt, token stream, text, reasoning, and the content of the cache afterwards."""

import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from offload_moe.chat.chat_template import Message, unfinished
from offload_moe.chat.prefix import PrefixCache
from offload_moe.chat.prompt_chunks import prompt_chunk_tokens
from offload_moe.chat.reasoning import Piece, make_splitter
from offload_moe.chat.sampling import Sampling
from offload_moe.chat.stats import Finish, TurnStats
from offload_moe.chat.stream import TokenStream
from offload_moe.chat.template import PromptFormat
from offload_moe.chat.text import IncrementalText
from offload_moe.errors import BudgetError, ConfigError
from offload_moe.plan.room import ContextRoom
from offload_moe.residency.counters import Counters

# The limit where settings, checkpoint and context set none: some models never end an answer.
DEFAULT_MAX_NEW_TOKENS = 4096
_CONTEXT_TOKENS = 8


class Answer:
    """One answer. The constructor renders the prompt, checks it and matches it with the cache; `pieces` computes.

    Raises:
        ConfigError: the prompt does not fit in the model's context.
        BudgetError: the prompt does not fit in memory.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        prompt_format: PromptFormat,
        prefix: PrefixCache,
        messages: Sequence[Message],
        sampling: Sampling,
        stop_event: threading.Event | None = None,
        room: ContextRoom | None = None,
    ) -> None:
        self.text = ""
        self.reasoning = ""
        self.finish: Finish = "interrupted"
        self._hf = hf
        self._format = prompt_format
        self._prefix = prefix
        self._messages = messages
        self._sampling = sampling
        self._stop_event = stop_event
        self._prompt = prompt_format.render(messages)
        self._ids = prompt_format.encode(self._prompt)
        self._max_new_tokens, self._end = _room(hf, len(self._ids), sampling)
        self._num_reused, self._reuse = prefix.begin(self._ids)
        self._cache = prefix.cache
        if room is not None:
            self._limit_to(room)
        self._num_in_cache = self._num_reused
        self._opening_s = 0.0
        self._stream: TokenStream | None = None
        self._prompt_stream: TokenStream | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the answer so far."""
        return len(self._ids) + (len(self._stream.tokens) if self._stream is not None else 0)

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """Prompt tokens computed so far, and to be computed in all."""
        total = len(self._ids) - self._num_reused
        if self._prompt_stream is None:
            return 0, total
        done = self._num_in_cache - self._num_reused + int(self._prompt_stream.num_prompt_tokens)
        return min(done, total), total

    def pieces(self) -> Iterator[Piece]:
        """Yield the answer piece by piece. Closing the iterator stops the model; the cache stays consistent."""
        self._compute_opening()
        if self._is_stopped():
            return
        with self._start(self._ids, self._max_new_tokens, self._sampling) as self._stream:
            self._prompt_stream = self._stream
            try:
                for piece in self._split(self._stream):
                    if piece.kind == "answer":
                        self.text += piece.text
                    else:
                        self.reasoning += piece.text
                    yield piece
            finally:
                self._stream.close()
                tokens = self._stream.tokens
                # The last token has been chosen but not computed.
                in_cache = [*self._ids, *tokens][:-1] if tokens else self._ids[: self._num_in_cache]
                self._prefix.commit(self._cache, in_cache, is_whole=not self._stream.interrupted_forward)

    def stats(
        self, counters: Counters | None, memory_bytes: Mapping[str, int], num_slots_given_up: int = 0
    ) -> TurnStats:
        """Tokens, seconds and bytes (by part of memory) of the ended answer. counters: of the tiers, of this answer."""
        stream = self._stream
        return TurnStats(
            num_prompt_tokens=len(self._ids),
            num_reused_tokens=self._num_reused,
            reuse=self._reuse,
            prompt_s=self._opening_s + (stream.prompt_s if stream is not None else 0.0),
            num_decode_tokens=len(stream.tokens) if stream is not None else 0,
            decode_s=stream.decode_s if stream is not None else 0.0,
            finish=self.finish,
            counters=counters,
            memory_bytes=dict(memory_bytes),
            num_slots_given_up=num_slots_given_up,
            crossed_window=self._prefix.crossed_window or (stream.crossed_window if stream is not None else None),
        )

    def _limit_to(self, room: ContextRoom) -> None:
        """Refuse a prompt that does not fit in memory, and limit the answer to what fits behind it."""
        num_tokens = len(self._ids)
        num_new = num_tokens - self._num_reused
        try:
            limit = room.limit(num_tokens, min(num_new, prompt_chunk_tokens(self._hf) or num_new), self._cache)
        except BudgetError:
            self._prefix.commit(self._cache, self._ids[: self._num_reused], is_whole=True)
            raise
        if limit - num_tokens < self._max_new_tokens:
            self._max_new_tokens, self._end = limit - num_tokens, "memory"

    def _split(self, stream: TokenStream) -> Iterator[Piece]:
        tokenizer, special_tokens = self._format.tokenizer, self._format.special_tokens
        splitter = make_splitter(
            template=self._format.template, prompt=self._prompt, unfinished=unfinished(self._messages)
        )
        text = IncrementalText(tokenizer, self._ids[-_CONTEXT_TOKENS:])
        is_stopped_by_model = False
        for token in stream:
            if is_stopped_by_model := token in self._format.stop_ids:
                break
            if (special := special_tokens.get(token)) is not None:
                yield from splitter.text(text.flush())
                yield from splitter.marker(special)
            else:
                yield from splitter.text(text.push(token))
        yield from splitter.text(text.flush())
        yield from splitter.flush()
        self.finish = self._finish(is_stopped_by_model)

    def _finish(self, is_stopped_by_model: bool) -> Finish:
        assert self._stream is not None
        if not is_stopped_by_model and len(self._stream.tokens) >= self._max_new_tokens:
            return self._end
        return "interrupted" if self._is_stopped() and not is_stopped_by_model else "stop"

    def _compute_opening(self) -> None:
        """Where a layer drops earlier state, compute the part that the next prompt shares first, and keep its state."""
        if not self._prefix.needs_snapshot:
            return
        boundary = self._format.boundary(self._messages, self._ids)
        if boundary <= self._num_reused or not self._prefix.is_kept_at(boundary, len(self._ids)):
            return
        is_whole = False
        with self._start(self._ids[:boundary], 1, Sampling(temperature=0)) as stream:
            self._prompt_stream = stream
            try:
                for _ in stream:
                    is_whole = True
            finally:
                stream.close()
                self._opening_s = stream.prompt_s
                self._num_in_cache = boundary if is_whole else self._num_reused
                self._prefix.commit(self._cache, self._ids[: self._num_in_cache], is_whole=is_whole)
        if is_whole:
            self._prefix.take_snapshot()

    def _start(self, ids: Sequence[int], max_new_tokens: int, sampling: Sampling) -> TokenStream:
        return TokenStream(
            self._hf,
            torch.tensor([ids], device=self._hf.device),
            sampling.generation_config(self._hf, stop_ids=self._format.stop_ids, max_new_tokens=max_new_tokens),
            past_key_values=self._cache,
            tokenizer=self._format.tokenizer,
            seed=sampling.seed,
            stop_event=self._stop_event,
        )

    def _is_stopped(self) -> bool:
        return self._stop_event is not None and self._stop_event.is_set()


def _room(hf: PreTrainedModel, num_prompt_tokens: int, sampling: Sampling) -> tuple[int, Finish]:
    """The most tokens of the answer, and why it ends at that many."""
    wanted = sampling.max_new_tokens or hf.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    limit = context_limit(hf)
    if limit is None or num_prompt_tokens + wanted <= limit:
        return wanted, "length"
    if num_prompt_tokens >= limit:
        raise ConfigError(
            f"The conversation is {num_prompt_tokens:,} tokens long and the model's context is {limit:,}. Shorten the "
            "message, or begin a new conversation (/reset)."
        )
    return limit - num_prompt_tokens, "context"


def context_limit(hf: PreTrainedModel) -> int | None:
    """Tokens the model can attend to, prompt and answer together; None where it sets no bound."""
    limit = getattr(hf.config.get_text_config(decoder=True), "max_position_embeddings", None)
    is_bound = isinstance(limit, int) and limit > 0 and not hf.config.is_encoder_decoder
    return limit if is_bound else None
