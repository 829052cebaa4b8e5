"""The model of a server: loaded at the first request, given back while it is idle."""

import copy
import gc
import logging
import threading
import time
from asyncio import wrap_future
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Literal

import psutil

from offload_moe.chat.generation import DEFAULT_MAX_NEW_TOKENS, context_limit
from offload_moe.chat.prefix import PrefixCache
from offload_moe.chat.sharing import sharing_of
from offload_moe.chat.template import PromptFormat
from offload_moe.engine.model import Model
from offload_moe.errors import ConfigError
from offload_moe.plan.budget import give_back_freed_memory
from offload_moe.residency.counters import Counters
from offload_moe.serve.board import Board
from offload_moe.serve.config import SHARED, ServeConfig
from offload_moe.serve.errors import ApiError, closed
from offload_moe.serve.guide import Guides
from offload_moe.serve.prefixes import Prefixes
from offload_moe.serve.prompts import Prompts
from offload_moe.serve.worker import Job, QueueFull, Worker, WorkerClosed

logger = logging.getLogger(__name__)

PARKED_SHARE = 0.25  # of the available RAM, for one cache

State = Literal["ok", "loading", "unloaded", "draining"]


class Loaded:
    """A model, and what requests need of it. Requests read texts with a tokenizer of their own, under `lock`."""

    def __init__(self, model: Model, config: ServeConfig) -> None:
        """Read the tokenizer and its template. Raises: ConfigError where there is none."""
        if model.tokenizer is None:
            raise ConfigError(f"{model.no_tokenizer} A server needs one.")
        self.model = model
        self.lock = threading.Lock()
        self.tokenizer = copy.deepcopy(model.tokenizer)
        self.prompts = Prompts(PromptFormat(model.hf, self.tokenizer))
        self.raw = Prompts(PromptFormat(model.hf, self.tokenizer, raw=True))
        self.context = context_limit(model.hf)
        self.prefixes = Prefixes(
            lambda: PrefixCache(model.hf),
            most=config.cache_slots,
            budget_tokens=model.placement.context,
            can_park=_has_ram_for if model.hf.device.type != "cpu" else lambda num_bytes: False,
        )

    @cached_property
    def guides(self) -> Guides:
        """Made at the first use. Raises: ApiError where there can be none."""
        return Guides(self.tokenizer, self.prompts.format.stop_ids, self.num_logits)

    @property
    def default_max_tokens(self) -> int:
        """Where a request sets no limit."""
        return self.model.hf.generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS

    def token_bytes(self, token: int) -> bytes:
        """Of one token, which may be a part of a character."""
        try:
            return bytes(self.guides.tokenizer.decode_bytes([token]))
        except ApiError:  # no fast tokenizer
            return str(self.tokenizer.decode([token])).encode()

    def first_token(self, text: str) -> int | None:
        with self.lock:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return int(ids[0]) if ids else None

    @cached_property
    def num_logits(self) -> int:
        head = self.model.hf.get_output_embeddings()
        width = getattr(head, "out_features", None)
        return int(width if width is not None else self.model.hf.config.get_text_config(decoder=True).vocab_size)


class Host:
    """Owns the model and the engine's thread; everything that changes the model happens there."""

    def __init__(
        self, load: Callable[[], Model], config: ServeConfig, name: str, *, model: Model | None = None
    ) -> None:
        """load: makes the model; called again after an idle unload. model: one that is loaded, and the caller's."""
        self.config, self.name, self.created_at = config, name, time.time()
        self.board = Board()
        self.is_draining = False
        self._load, self._own = load, model is None
        self._loaded = Loaded(model, config) if model is not None else None
        self._is_loading = False
        self.num_users = 0
        self._earlier = Counters()  # of models that were unloaded
        idle_s = config.keep_alive_s if model is None else None
        self.worker = Worker(
            parallel=config.parallel or SHARED,
            alternates=self._alternates,
            most_waiting=config.queue,
            idle_s=idle_s,
            on_idle=self.unload_when_idle,
        )

    def _alternates(self) -> bool:
        """Whether several requests are to be answered at once now."""
        if self.config.parallel is not None:
            return True
        loaded = self._loaded
        return loaded is not None and sharing_of(loaded.model.hf).pays(loaded.model.hf)

    def adopt(self, model: Model) -> None:
        """Take over a model that `load` would make, before the first request."""
        self._loaded = Loaded(model, self.config)
        if self.config.keep_alive_s is not None:
            self.worker.call(lambda: None)  # begins the thread, which counts the seconds

    @property
    def state(self) -> State:
        if self.is_draining:
            return "draining"
        if self._is_loading:
            return "loading"
        return "ok" if self._loaded is not None else "unloaded"

    @property
    def loaded(self) -> Loaded | None:
        """The model where it is loaded; a request uses `use`."""
        return self._loaded

    @property
    def counters(self) -> Counters:
        """What the experts did since the server began."""
        loaded = self._loaded
        return self._earlier if loaded is None else self._earlier.plus(loaded.model.stats)

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Loaded]:
        """The model, loaded where need be, and kept as long as the context lasts. Raises: ApiError."""
        if self.is_draining:
            raise ApiError(503, "The server is shutting down. Try again later.", code="shutting_down", retry_after_s=5)
        self.num_users += 1
        try:
            yield await wrap_future(self._call(self.ensure_loaded))
        finally:
            self.num_users -= 1

    def _call(self, function: Callable[[], Loaded]) -> Future[Loaded]:
        if (loaded := self._loaded) is not None:
            done: Future[Loaded] = Future()
            done.set_result(loaded)
            return done
        try:
            return self.worker.call(function)
        except WorkerClosed as error:
            raise closed() from error

    def submit(self, job: Job) -> None:
        """Put a request into the queue. Raises: ApiError when it is full."""
        try:
            self.worker.submit(job)
        except QueueFull:
            self.board.num_refused += 1
            raise ApiError(
                429,
                f"{self.worker.num_waiting} requests are waiting already. Try again later, or start the server with a "
                "longer --queue.",
                code="queue_full",
                retry_after_s=self._retry_after_s(),
            ) from None
        except WorkerClosed as error:
            raise closed() from error

    def cancel(self, job: Job) -> None:
        """The client has left, or the request has ended."""
        if job.began_at is None and not job.stop.is_set():
            self.board.num_cancelled += 1
        self.worker.cancel(job)

    def ensure_loaded(self) -> Loaded:
        """In the engine's thread."""
        if self._loaded is None:
            self._is_loading = True
            try:
                self._loaded = Loaded(self._load(), self.config)
            finally:
                self._is_loading = False
        return self._loaded

    def drain(self, limit_s: float) -> bool:
        """Refuse new requests and wait for those that are under way."""
        self.is_draining = True
        return self.worker.drain(limit_s)

    def stop(self) -> None:
        """End every request, and the engine's thread."""
        self.worker.close()

    def close(self) -> None:
        """End the engine's thread, and close the model unless it is the caller's."""
        self.is_draining = True
        self.worker.close()
        self._unload()

    def _retry_after_s(self) -> int:
        """A guess: as long as the requests that run have taken so far, at least."""
        ages = [each.to_json()["age_s"] for each in list(self.board.running.values())]
        return max(1, min(60, int(max(ages, default=1))))

    def unload_when_idle(self) -> None:
        """Free the model where no request uses it."""
        if self.num_users or not self._own:
            return
        if self._loaded is not None:
            logger.info("%s is unloaded until the next request", self.name)
            self._unload(unless_used=True)
        else:
            give_back_freed_memory()  # what the frames of the last request held a moment longer

    def _unload(self, *, unless_used: bool = False) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        if unless_used and self.num_users:  # a request has come meanwhile, and may have seen the model
            self._loaded = loaded
            return
        loaded.prefixes.clear()
        self._earlier = self._earlier.plus(loaded.model.stats)
        if self._own:
            loaded.model.close()
            del loaded
            gc.collect()
            give_back_freed_memory()


def _has_ram_for(num_bytes: int) -> bool:
    """Whether a device's cache may be moved to RAM, which the plan did not count: by far the most of it stays free."""
    return num_bytes < PARKED_SHARE * psutil.virtual_memory().available
