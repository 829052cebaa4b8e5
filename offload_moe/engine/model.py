"""`Model`: a loaded model, as `load` returns it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, Unpack

import psutil

from offload_moe.chat import ChatSession
from offload_moe.chat.many import Many
from offload_moe.chat.prompt import Prompt
from offload_moe.chat.sampling import Sampling, SamplingArguments
from offload_moe.decode import FastPath
from offload_moe.engine.build import Engine
from offload_moe.engine.saving import refuse_to_save
from offload_moe.errors import ConfigError
from offload_moe.memory.copier import peak_device_memory
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.plan.budget import peak_ram
from offload_moe.plan.placement import Placement
from offload_moe.plan.room import ContextRoom
from offload_moe.profile.recorder import RecordedTier, Recorder, Subject, record
from offload_moe.residency.counters import Counters
from offload_moe.residency.popularity import save_popularity
from offload_moe.residency.prefetch import LayerTally
from offload_moe.speculate.speculation import speculation_of
from offload_moe.store import Store


class Model:
    """A loaded model. `hf` is the transformers model itself: `hf.generate`, processors and samplers just work."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        tokenizer: tuple[Any, str],
        placement: Placement,
        room: ContextRoom,
        summary: str,
    ) -> None:
        """tokenizer: with the reason where it is None. placement: the plan of memory. room: memory for contexts.

        summary: the plan in one line.
        """
        self.placement = placement
        self.summary = summary
        self.notices: list[str] = []  # messages for the user
        self.fast_path: FastPath | None = None  # the layers that take it, and why others do not; None: not installed
        self.room = room
        self.store = store
        self.engine = engine
        self.hf = engine.hf
        self.tokenizer, self.no_tokenizer = tokenizer
        self.layers = engine.layers
        modules = [self.hf] if engine.mtp is None else [self.hf, engine.mtp]
        tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        self._dense_bytes = sum(t.nbytes for t in tensors.values())

    @property
    def stats(self) -> Counters:
        """Running totals since `load`: hits, misses, stalls, bytes, tokens and their rates."""
        return self.engine.hierarchy.counters

    @property
    def lookahead_tallies(self) -> list[LayerTally]:
        """For each MoE layer, how many guesses for it were right and fetched; empty without prefetch."""
        lookahead = self.engine.lookahead
        return lookahead.tallies if lookahead is not None else []

    @property
    def memory(self) -> dict[str, int]:
        """Bytes in use by part; the parts do not overlap."""
        hierarchy = self.engine.hierarchy
        num_device_slots = hierarchy.num_slots("vram")
        on_device = num_device_slots > 0
        slot_bytes = hierarchy.pools.slot_bytes if hierarchy.lifecycle.is_open else 0
        parts = {
            "dense weights": self._dense_bytes,
            "expert slots in RAM": hierarchy.ram.residency.num_resident * slot_bytes,
        }
        in_ram = sum(parts.values()) - (self._dense_bytes if on_device else 0)
        parts["rest of the process"] = max(0, psutil.Process().memory_info().rss - in_ram)
        if on_device:
            parts["expert slots in VRAM"] = num_device_slots * slot_bytes
        return parts

    @property
    def peaks(self) -> dict[str, tuple[int, int]]:
        """By memory: bytes planned for the whole planned context, and the most bytes in use so far."""
        peaks = {"RAM": (self.placement.ram.used_bytes, peak_ram())}
        if self.placement.vram is not None:
            peaks["VRAM"] = (self.placement.vram.used_bytes, peak_device_memory(self.hf.device))
        return peaks

    def generate(self, prompt: Prompt, *, raw: bool = False, **sampling: Unpack[SamplingArguments]) -> str:
        """The whole answer to a text or a list of messages. `raw` continues the text instead of answering it."""
        return "".join(self.stream(prompt, raw=raw, **sampling))

    def stream(self, prompt: Prompt, *, raw: bool = False, **sampling: Unpack[SamplingArguments]) -> Iterator[str]:
        """The answer piece by piece, without its reasoning."""
        for piece in self.chat(raw=raw).send(prompt, **sampling):
            if piece.kind == "answer":
                yield piece.text

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        raw: bool = False,
        parallel: int = MAX_ROWS,
        **sampling: Unpack[SamplingArguments],
    ) -> Iterator[str]:
        """The answers to many prompts in their order, each the one that `generate` gives, a seed included.

        prompts: texts or lists of messages; an iterator is read as it is needed. parallel: answers at once, at most,
        which share passes while that pays. One that memory has no room for beside the others waits for an end.

        Raises: ConfigError, ModelClosed; while iterating, what `generate` raises for a prompt, in its place.
        """
        Sampling.of(sampling)
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise ConfigError("The prompts are not a list. Give a list of texts, or generate one answer.")
        if not isinstance(parallel, int) or isinstance(parallel, bool) or parallel < 1:
            raise ConfigError(f"parallel is {parallel!r}. It must be a whole number from 1 on.")
        self._check_chat()
        return Many(lambda prompt: self.chat(raw=raw).steps(prompt, **sampling), prompts, parallel).answers()

    def chat(self, *, system: str | None = None, raw: bool = False) -> ChatSession:
        """A conversation whose earlier turns are not computed again.

        Raises: ConfigError without a tokenizer, ModelClosed.
        """
        self._check_chat()
        return ChatSession(
            self.hf,
            self.tokenizer,
            self.stats,
            memory=lambda: self.memory,
            room=self.room,
            system=system,
            raw=raw,
        )

    def _check_chat(self) -> None:
        self.engine.hierarchy.lifecycle.check()
        if self.tokenizer is None:
            raise ConfigError(f"{self.no_tokenizer} model.hf.generate takes token ids.")

    @contextmanager
    def trace(self) -> Iterator[Recorder]:
        """Record routing, hits, stalls and times of all passes meanwhile; the recorder makes a trace of them.

        Answers that begin meanwhile guess no tokens, so a pass of decode is a token.

        Raises: ModelClosed.
        """
        hierarchy = self.engine.hierarchy
        hierarchy.lifecycle.check()
        tiers = [RecordedTier(name="ram", scheduler=hierarchy.ram, bytes_field="disk_bytes")]
        if hierarchy.scheduler is not hierarchy.ram:
            tiers.insert(0, RecordedTier(name="vram", scheduler=hierarchy.scheduler, bytes_field="h2d_bytes"))
        metadata = {
            "model": self.store.source,
            "codec": self.store.codec,
            "policy": hierarchy.pools.policy,
            "slot_bytes": hierarchy.pools.slot_bytes,
            "memory_bytes": self.memory,
        }
        subject = Subject(hf=self.hf, layers=self.layers, tiers=tiers, metadata=metadata)
        with record(subject) as recorder, speculation_of(self.hf).paused():
            yield recorder

    def close(self) -> None:
        """Free experts, threads and files. A pass in progress ends at its next layer; a later use raises ModelClosed.

        May be called again, and from any thread or signal handler. The number of uses of each expert is kept beside the
        store, where that is writable, for the next `load`. A model that is dropped is freed, too, without saving those.
        """
        hierarchy = self.engine.hierarchy
        was_open = hierarchy.lifecycle.is_open
        hierarchy.close()
        if was_open:
            save_popularity(hierarchy, self.store.path)

    __reduce_ex__ = refuse_to_save  # pickle and copy

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
