"""The tokens behind a prompt: matched with a kept prefix, checked against context and memory, committed afterwards."""

import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from offload_moe.chat.prefix import PrefixCache
from offload_moe.chat.prompt_chunks import prompt_chunk_tokens
from offload_moe.chat.sampling import Sampling
from offload_moe.chat.sharing import Share
from offload_moe.chat.stats import Finish
from offload_moe.chat.steering import NO_STEERING, Steering
from offload_moe.chat.stream import TokenStream
from offload_moe.errors import BudgetError, ConfigError
from offload_moe.families.text_model import TextModel
from offload_moe.plan.room import ContextRoom
from offload_moe.speculate.speculator import Speculator
from offload_moe.speculate.tally import Tally

# The limit where settings, checkpoint and context set none: some models never end an answer.
DEFAULT_MAX_NEW_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """What is to be computed.

    ids: the prompt, ``[T]``. boundary: how many of them are certain to open the next prompt too; called only where a
    layer drops earlier state. make_config: for so many new tokens. max_new_tokens: None takes the model's own limit.
    seed: None draws from torch's own random numbers. speculator: guesses of this conversation; None makes none.
    """

    ids: Sequence[int]
    boundary: Callable[[], int]
    make_config: Callable[[int], GenerationConfig]
    stop_ids: Collection[int]
    tokenizer: PreTrainedTokenizerBase | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    steering: Steering = field(default=NO_STEERING)
    speculator: Speculator | None = None


class Generation:
    """One request. The prompt is checked and matched with the prefix at once; `steps` computes.

    Raises:
        ConfigError: the prompt does not fit in the model's context.
        BudgetError: the prompt does not fit in memory.
    """

    def __init__(
        self,
        hf: TextModel,
        prefix: PrefixCache,
        request: TokenRequest,
        *,
        stop_event: threading.Event | None = None,
        room: ContextRoom | None = None,
    ) -> None:
        self._hf, self._prefix, self._request, self._stop_event = hf, prefix, request, stop_event
        self._ids = list(request.ids)
        self.max_new_tokens, self.end = _room(hf, len(self._ids), request.max_new_tokens)
        self.num_reused, self.reuse = prefix.begin(self._ids)
        self._cache = prefix.cache
        if room is not None:
            self._limit_to(room)
        self._num_in_cache = self.num_reused
        self._opening_s = 0.0
        self._stream: TokenStream | None = None
        self._prompt_stream: TokenStream | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._ids)

    @property
    def tokens(self) -> Sequence[int]:
        """New ones, so far."""
        return self._stream.tokens if self._stream is not None else ()

    @property
    def prompt_s(self) -> float:
        return self._opening_s + (self._stream.prompt_s if self._stream is not None else 0.0)

    @property
    def decode_s(self) -> float:
        return self._stream.decode_s if self._stream is not None else 0.0

    @property
    def crossed_window(self) -> int | None:
        """See `TurnStats`."""
        return self._prefix.crossed_window or (self._stream.crossed_window if self._stream is not None else None)

    @property
    def guesses(self) -> Tally | None:
        """What came of them; None where none were made."""
        return self._request.speculator.tally if self._request.speculator is not None else None

    @property
    def share(self) -> Share:
        """See `TokenStream.share`."""
        return self._stream.share if self._stream is not None else Share()

    @property
    def is_stopped(self) -> bool:
        return self._stop_event is not None and self._stop_event.is_set()

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """Prompt tokens computed so far, and to be computed in all."""
        total = len(self._ids) - self.num_reused
        if self._prompt_stream is None:
            return 0, total
        done = self._num_in_cache - self.num_reused + int(self._prompt_stream.num_prompt_tokens)
        return min(done, total), total

    def steps(self) -> Generator[int | None, None, None]:
        """None for each part of the prompt, then the tokens. Closing it stops; the prefix is right in every case."""
        yield from self._compute_opening()
        if self.is_stopped:
            return
        request = self._request
        config = request.make_config(self.max_new_tokens)
        with self._start(self._ids, config, request) as self._stream:
            self._prompt_stream = self._stream
            try:
                yield from _steps_of(self._stream)
            finally:
                self._stream.close()
                tokens = self._stream.tokens
                # The last token has been chosen but not computed.
                in_cache = [*self._ids, *tokens][:-1] if tokens else self._ids[: self._num_in_cache]
                if not self._stream.has_lost_cache:
                    self._prefix.commit(self._cache, in_cache, is_whole=not self._stream.interrupted_forward)

    def _limit_to(self, room: ContextRoom) -> None:
        """Refuse a prompt that does not fit in memory, and limit the answer to what fits behind it."""
        num_tokens = len(self._ids)
        num_new = num_tokens - self.num_reused
        try:
            limit = room.limit(num_tokens, min(num_new, prompt_chunk_tokens(self._hf) or num_new), self._cache)
        except BudgetError:
            self._prefix.commit(self._cache, self._ids[: self.num_reused], is_whole=True)
            raise
        if limit - num_tokens < self.max_new_tokens:
            self.max_new_tokens, self.end = limit - num_tokens, "memory"

    def _compute_opening(self) -> Iterator[None]:
        """Where a layer drops earlier state, compute the part that the next prompt shares first, and keep its state."""
        if not self._prefix.needs_snapshot:
            return
        boundary = self._request.boundary()
        if boundary <= self.num_reused or not self._prefix.is_kept_at(boundary, len(self._ids)):
            return
        is_whole = False
        config = Sampling(temperature=0).generation_config(self._hf, stop_ids=self._request.stop_ids, max_new_tokens=1)
        plain = replace(self._request, seed=None, steering=NO_STEERING, speculator=None)
        with self._start(self._ids[:boundary], config, plain) as stream:
            self._prompt_stream = stream
            try:
                for token in _steps_of(stream):
                    is_whole = token is not None
                    yield None
            finally:
                stream.close()
                self._opening_s = stream.prompt_s
                self._num_in_cache = boundary if is_whole else self.num_reused
                self._prefix.commit(self._cache, self._ids[: self._num_in_cache], is_whole=is_whole)
        if is_whole:
            self._prefix.take_snapshot()

    def _start(self, ids: Sequence[int], config: GenerationConfig, request: TokenRequest) -> TokenStream:
        return TokenStream(
            self._hf,
            torch.tensor([ids], device=self._hf.device),
            config,
            cache=self._cache,
            tokenizer=request.tokenizer,
            seed=request.seed,
            stop_event=self._stop_event,
            steering=request.steering,
            speculator=request.speculator,
        )


def _steps_of(stream: TokenStream) -> Iterator[int | None]:
    while True:
        try:
            token = stream.step()
        except StopIteration:
            return
        yield token


def _room(hf: TextModel, num_prompt_tokens: int, max_new_tokens: int | None) -> tuple[int, Finish]:
    """The most tokens of the answer, and why it ends at that many."""
    wanted = max_new_tokens or hf.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    limit = context_limit(hf)
    if limit is None or num_prompt_tokens + wanted <= limit:
        return wanted, "length"
    if num_prompt_tokens >= limit:
        raise ConfigError(
            f"The conversation is {num_prompt_tokens:,} tokens long and the model's context is {limit:,}. Shorten the "
            "message, or begin a new conversation (/reset)."
        )
    return limit - num_prompt_tokens, "context"


def context_limit(hf: TextModel) -> int | None:
    """Tokens the model can attend to, prompt and answer together; None where it sets no bound."""
    limit = getattr(hf.config.get_text_config(decoder=True), "max_position_embeddings", None)
    is_bound = isinstance(limit, int) and limit > 0 and not hf.config.is_encoder_decoder
    return limit if is_bound else None
