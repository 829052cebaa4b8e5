"""A stream of tokens: one request, computed step by step in the thread that iterates."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final, Self

import torch
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from offload_moe.chat.recompute import recompute_of
from offload_moe.chat.sharing import Member, Share
from offload_moe.chat.steering import NO_STEERING, Steering
from offload_moe.chat.steps import steps
from offload_moe.chat.turns import turns_of
from offload_moe.experts.observer import HookObserver
from offload_moe.families.text_model import TextModel
from offload_moe.native.session import lost_card
from offload_moe.speculate.speculator import Speculator
from offload_moe.system.interrupts import HeldInterrupt
from offload_moe.system.stopping import StoppedInForward, stoppable

_END: Final = -1  # no token


class TokenStream(Iterator[int]):
    """Iterates over the new tokens of one sequence. Use it as a context manager, or call `close`.

    Streams of one model may be iterated in any order and from any threads: they take turns, a step each. `close`, the
    stop event and an interrupt end a stream after the step in progress; a prompt ends at its next layer or wave of
    experts.
    `num_prompt_tokens` is the number of prompt tokens computed so far; fractional within a forward pass.
    """

    def __init__(
        self,
        hf: TextModel,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        *,
        cache: Cache | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int | None = None,
        stop_event: threading.Event | None = None,
        steering: Steering = NO_STEERING,
        speculator: Speculator | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.interrupted_forward = False
        self.num_prompt_tokens = 0.0
        self.prompt_s = 0.0  # seconds until the first token, 0 before it
        self.decode_s = 0.0  # seconds of the tokens after it, waiting for their turns included
        self.crossed_window: int | None = None  # tokens beyond which all keys are rotated, and so computed, again
        self._is_closed = False
        self._stop_event = stop_event
        self._elapsed_s = 0.0
        self._turns = turns_of(hf)
        self._recompute = recompute_of(hf)
        self._layers = [module for module in hf.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._interrupt = HeldInterrupt()
        self._member = Member()
        self._steps = steps(
            hf,
            input_ids,
            generation_config,
            cache=cache,
            tokenizer=tokenizer,
            seed=seed,
            watched=self._watched,
            steering=steering,
            speculator=speculator,
            member=self._member,
        )

    @property
    def share(self) -> Share:
        """What the experts did for it in the turns of other streams, less what they did for those in its own."""
        return self._member.share

    @property
    def has_lost_cache(self) -> bool:
        """Whether it was closed while a pass had to go on writing to its cache, which is of no use then."""
        return self._member.is_lost

    def __next__(self) -> int:
        while (token := self.step()) is None:
            pass
        return token

    def step(self) -> int | None:
        """One turn: a token, or None for a part of the prompt. Raises StopIteration at the end."""
        if not self._is_stopping() and (token := self._step()) != _END:
            return token
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Compute no further step. A step that another thread computes meanwhile ends as a stopped one does."""
        self._is_closed = True
        with suppress(ValueError):  # another thread executes it
            self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _step(self) -> int | None:
        start_s = time.perf_counter()
        with (
            HeldInterrupt() as self._interrupt,
            suppress(StoppedInForward),
            self._turns.turn(self._is_stopping),
        ):
            token = self._compute()
            self._count(token, time.perf_counter() - start_s + self._member.take_seconds_before(start_s))
            return token
        return _END

    def _compute(self) -> int | None:
        """One step: None after a part of the prompt, a token, or `_END`."""
        self.interrupted_forward = True
        if self._recompute is not None:
            self._recompute.take_crossed_window()  # drops the one of earlier work of this thread
        try:
            # generate() itself only turns gradients off; inference mode also saves their bookkeeping, 7% of a token.
            with torch.inference_mode():
                token = next(self._steps, _END)
        except torch.AcceleratorError as error:
            raise lost_card(str(error).partition("\n")[0]) from error
        finally:
            if self._recompute is not None:
                self.crossed_window = self._recompute.take_crossed_window() or self.crossed_window
        self.interrupted_forward = token is None
        return token

    def _count(self, token: int | None, elapsed_s: float) -> None:
        self._elapsed_s += elapsed_s
        if token is None or token == _END:
            return
        if self.tokens:
            self.decode_s += elapsed_s
        else:
            self.prompt_s = self._elapsed_s
        self.tokens.append(token)

    def _is_stopping(self) -> bool:
        is_stopped = self._stop_event is not None and self._stop_event.is_set()
        return self._is_closed or is_stopped or self._interrupt.is_waiting

    @contextmanager
    def _watched(self, num_tokens: int) -> Iterator[None]:
        """Let a stop take effect within a forward: a prompt over a slow disk takes minutes per forward."""
        watch = _LayerWatch(self._at_layer, num_tokens / max(len(self._layers), 1))
        handles = [layer.register_forward_pre_hook(watch) for layer in self._layers]
        try:
            with stoppable(self._is_stopping):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _at_layer(self, num_tokens: float) -> None:
        if self._is_stopping():
            raise StoppedInForward
        self.num_prompt_tokens += num_tokens


class _LayerWatch(HookObserver):
    """Runs before each decoder layer; reports the layers computed by the thread that created it."""

    def __init__(self, report: Callable[[float], None], share: float) -> None:
        self._report, self._share, self._thread = report, share, threading.get_ident()

    def __call__(self, *_: object) -> None:
        if threading.get_ident() == self._thread:
            self._report(self._share)
