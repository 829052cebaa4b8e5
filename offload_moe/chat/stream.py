"""A stream of tokens: transformers' own generate() in a worker thread, each token handed over as it is chosen."""

import atexit
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_layers import GradientCheckpointingLayer

from offload_moe.chat.prompt_chunks import prompt_chunk_tokens
from offload_moe.chat.recompute import recompute_of
from offload_moe.decode.hooks import HookObserver
from offload_moe.errors import ModelClosed
from offload_moe.system.lifecycle import FORKED

# Waiting without an end cannot be interrupted on Windows.
POLL_S = 0.1
_LOCKS: WeakKeyDictionary[PreTrainedModel, threading.Lock] = WeakKeyDictionary()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_LOCKS.clear)  # their holders stayed in the parent


class TokenStream(Iterator[int]):
    """Iterates over the new tokens of one sequence. Use it as a context manager, or call `close`.

    An exception in the worker is raised at the consumer. `close` returns once the worker has ended: it stops at the
    next decoder layer, even in the middle of a long prompt. `num_passes` counts the passes through the decoder layers
    whose modules compute, in fractions: how far a long prompt is.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        *,
        past_key_values: Cache | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int | None = None,
        stop_event: threading.Event | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.interrupted_forward = False
        self.num_passes = 0.0
        self.start_s = time.perf_counter()
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.crossed_window: int | None = None  # tokens beyond which all keys were rotated, and so computed, anew
        self._recompute = recompute_of(hf)
        self._is_closed = False
        self._process = os.getpid()
        self._stop_event = stop_event
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._arguments = {
            "generation_config": generation_config,
            "streamer": _Handover(self._take),
            "stopping_criteria": [_StopRequested(self.is_stopping)],
        }
        if past_key_values is not None:
            self._arguments["past_key_values"] = past_key_values
        if generation_config.stop_strings is not None:
            self._arguments["tokenizer"] = tokenizer
        chunk = prompt_chunk_tokens(hf)
        if chunk is not None and input_ids.shape[1] > chunk:
            generation_config.prefill_chunk_size = chunk
        self._worker = threading.Thread(
            target=self._work, args=(hf, input_ids, seed), name="offload-moe-generate", daemon=True
        )
        atexit.register(self.close)  # a thread that the interpreter stops inside torch takes the process with it
        self._worker.start()

    @property
    def prompt_s(self) -> float:
        """Seconds until the first token, 0 before it."""
        return self.first_token_s - self.start_s if self.first_token_s is not None else 0.0

    @property
    def decode_s(self) -> float:
        """Seconds from the first to the last token."""
        if self.first_token_s is None or self.last_token_s is None:
            return 0.0
        return self.last_token_s - self.first_token_s

    def __next__(self) -> int:
        token = self._next()
        if token is not None:
            return token
        self._queue.put(None)
        self._worker.join()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """Stop the worker and wait until it has ended. Tokens it chose meanwhile are in `tokens`."""
        self._is_closed = True
        while self._worker.is_alive():
            self._worker.join(POLL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _next(self) -> int | None:
        while True:
            try:
                return self._queue.get(timeout=POLL_S)
            except queue.Empty:
                if os.getpid() != self._process:
                    raise ModelClosed(FORKED) from None

    def is_stopping(self) -> bool:
        """Whether the worker is to end at its next chance."""
        return self._is_closed or (self._stop_event is not None and self._stop_event.is_set())

    @contextmanager
    def _watched(self, hf: PreTrainedModel) -> Iterator[None]:
        """Stop at the next decoder layer once it is wanted: a prompt over a slow disk takes minutes per forward."""
        layers = [module for module in hf.modules() if isinstance(module, GradientCheckpointingLayer)]
        watch = _LayerWatch(self, 1 / max(len(layers), 1))
        handles = [layer.register_forward_pre_hook(watch) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, token: int) -> None:
        self.last_token_s = time.perf_counter()
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
        self.tokens.append(token)
        self._queue.put(token)

    def _work(self, hf: PreTrainedModel, input_ids: torch.Tensor, seed: int | None) -> None:
        try:
            # generate() itself only turns gradients off; inference mode also saves their bookkeeping, 7% of a token.
            with torch.inference_mode(), _turn(hf, self.is_stopping), self._watched(hf), _seeded(seed):
                hf.generate(input_ids, **self._arguments)
        except _StoppedInForwardError:
            self.interrupted_forward = True
        except BaseException as error:
            # Whatever it is belongs to the consumer.
            self.interrupted_forward = True
            self._error = error
        finally:
            self.crossed_window = None if self._recompute is None else self._recompute.crossed_window
            atexit.unregister(self.close)
            self._arguments.clear()  # they know this stream, and would keep the cache until the next collection
            self._queue.put(None)


class _StoppedInForwardError(Exception):
    """Leaves generate() from the middle of a forward pass."""


class _Handover(BaseStreamer):
    """Passes each new token on; the first call of generate() carries the prompt."""

    def __init__(self, take: Callable[[int], None]) -> None:
        self._take = take
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self._take(int(value.item()))

    def end(self) -> None:
        pass


class _StopRequested(StoppingCriteria):
    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        self._is_stopping = is_stopping

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._is_stopping(), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _turn(hf: PreTrainedModel, is_stopping: Callable[[], bool]) -> Iterator[None]:
    """Wait until no other stream computes with this model."""
    lock = _LOCKS.setdefault(hf, threading.Lock())
    while not lock.acquire(timeout=POLL_S):
        if is_stopping():
            raise _StoppedInForwardError
    try:
        yield
    finally:
        lock.release()


class _LayerWatch(HookObserver):
    """Called before each decoder layer; raises in the thread that made it once it is to stop."""

    def __init__(self, stream: TokenStream, share: float) -> None:
        self._stream, self._share, self._worker = stream, share, threading.get_ident()

    def __call__(self, *_: object) -> None:
        if threading.get_ident() != self._worker:
            return
        if self._stream.is_stopping():
            raise _StoppedInForwardError
        self._stream.num_passes += self._share


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seeded generator and put the caller's random state back."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
