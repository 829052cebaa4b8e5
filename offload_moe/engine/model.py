"""`load`: from a store to a transformers model whose experts come through the hierarchy."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack, cast

import psutil
import torch

from offload_moe.chat import ChatSession
from offload_moe.chat.prompt import Prompt
from offload_moe.chat.recompute import recompute_of
from offload_moe.chat.sampling import SamplingArguments
from offload_moe.checkpoint.token_ids import watch_ids
from offload_moe.checkpoint.tokenizer import load_tokenizer, tokenizer_notices
from offload_moe.convert.sources import Report, ensure_store, silent
from offload_moe.decode import FastPath, make_fast
from offload_moe.engine.assemble import LOSSLESS, Assembled, assemble, skeleton_of
from offload_moe.engine.overflow import watch_overflow
from offload_moe.engine.saving import refuse_saving, refuse_to_save
from offload_moe.errors import ConfigError
from offload_moe.experts.arithmetic import choose_arithmetic, keeps_eagers_bits
from offload_moe.experts.attach import BoundExperts, attach
from offload_moe.experts.contract import ExpertsContract
from offload_moe.experts.hybrid import Hybrid, HybridBinder
from offload_moe.experts.lookahead import DEFAULT_DEPTH, Lookahead
from offload_moe.experts.probe import find_probes
from offload_moe.memory.copier import AcceleratorCopier, compute_device, peak_device_memory
from offload_moe.memory.disk import DiskMover
from offload_moe.memory.unused_card import notice_of_unused_card
from offload_moe.native.kernels import use_torch_after_fork
from offload_moe.plan.budget import forget_peak, give_back_freed_memory, peak_ram
from offload_moe.plan.fit import fit, measure_load, notices_of_budget, summary
from offload_moe.plan.machine import compute_dtype
from offload_moe.plan.parameters import describe_skeleton
from offload_moe.plan.placement import Placement
from offload_moe.plan.plan import check_context
from offload_moe.plan.room import ContextRoom, may_lend
from offload_moe.profile.recorder import RecordedTier, Recorder, Subject, record
from offload_moe.quant import get_codec
from offload_moe.residency.counters import Counters
from offload_moe.residency.hierarchy import Hierarchy, Pools
from offload_moe.residency.policy import DEFAULT_POLICY, check_policy
from offload_moe.residency.popularity import remember, warm_start
from offload_moe.residency.prefetch import LayerTally, PrefetchGovernor
from offload_moe.store import Store
from offload_moe.system.names import DEMO
from offload_moe.system.sizes import parse_size


class Model:
    """A loaded model. `hf` is the transformers model itself: `hf.generate`, processors and samplers just work."""

    def __init__(
        self,
        store: Store,
        assembled: Assembled,
        tokenizer: tuple[Any, str],
        hierarchy: Hierarchy,
        placement: Placement,
        room: ContextRoom,
        summary: str,
    ) -> None:
        """tokenizer: None has a reason beside it. placement: where everything was planned to go. room: for contexts.

        summary: the plan in one line.
        """
        self.placement = placement
        self.summary = summary
        self.notices: list[str] = []  # what the user must know
        self.fast_path: FastPath | None = None  # which layers take it, and why others do not; None: `load` left it out
        self._room = room
        self.store = store
        self.hf = assembled.hf
        self.tokenizer, self._no_tokenizer = tokenizer
        self.layers = assembled.layers
        self._hierarchy = hierarchy
        self._dense_bytes = sum(t.nbytes for t in (*self.hf.parameters(), *self.hf.buffers()))

    @property
    def stats(self) -> Counters:
        """Running totals since `load`: hits, misses, stalls, bytes, tokens and their rates."""
        return self._hierarchy.counters

    @property
    def lookahead_tallies(self) -> list[LayerTally]:
        """For each MoE layer, how good the guesses for it were and what they moved; empty where nothing is guessed."""
        bound = cast(ExpertsContract, self.layers[0].module)._offload_moe
        return bound.lookahead.tallies if bound.lookahead is not None else []

    @property
    def memory(self) -> dict[str, int]:
        """Bytes in use by part; the parts do not overlap."""
        pools, ram = self._hierarchy.pools, self._hierarchy.ram
        num_device_slots = self._hierarchy.num_slots("vram")
        on_device = num_device_slots > 0
        slot_bytes = pools.slot_bytes if self._hierarchy.lifecycle.is_open else 0
        parts = {
            "dense weights": self._dense_bytes,
            "expert slots in RAM": ram.residency.num_resident * slot_bytes,
        }
        in_ram = sum(parts.values()) - (self._dense_bytes if on_device else 0)
        parts["rest of the process"] = max(0, psutil.Process().memory_info().rss - in_ram)
        if on_device:
            parts["expert slots in VRAM"] = num_device_slots * slot_bytes
        return parts

    @property
    def peaks(self) -> dict[str, tuple[int, int]]:
        """Memory -> bytes that were planned, for the whole planned context, and the most that were in use so far."""
        peaks = {"RAM": (self.placement.ram.used_bytes, peak_ram())}
        if self.placement.vram is not None:
            peaks["VRAM"] = (self.placement.vram.used_bytes, peak_device_memory(self.hf.device))
        return peaks

    def generate(self, prompt: Prompt, *, raw: bool = False, **sampling: Unpack[SamplingArguments]) -> str:
        """The whole answer to a text or a list of messages. `raw` continues the text instead of answering it."""
        return "".join(self.stream(prompt, raw=raw, **sampling))

    def stream(self, prompt: Prompt, *, raw: bool = False, **sampling: Unpack[SamplingArguments]) -> Iterator[str]:
        """The answer as it comes, without its reasoning."""
        for piece in self.chat(raw=raw).send(prompt, **sampling):
            if piece.kind == "answer":
                yield piece.text

    def chat(self, *, system: str | None = None, raw: bool = False) -> ChatSession:
        """A conversation whose earlier turns are not computed again.

        Raises: ConfigError without a tokenizer, ModelClosed.
        """
        self._hierarchy.lifecycle.check()
        if self.tokenizer is None:
            raise ConfigError(f"{self._no_tokenizer} model.hf.generate takes token ids.")
        return ChatSession(
            self.hf,
            self.tokenizer,
            self.stats,
            memory=lambda: self.memory,
            room=self._room,
            system=system,
            raw=raw,
        )

    @contextmanager
    def trace(self) -> Iterator[Recorder]:
        """Record routing, hits, stalls and times of what is computed meanwhile; then ask the recorder for its trace."""
        hierarchy = self._hierarchy
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
        subject = Subject(
            hf=self.hf, layers=self.layers, tiers=tiers, num_experts=hierarchy.pools.num_experts, metadata=metadata
        )
        with record(subject) as recorder:
            yield recorder

    def close(self) -> None:
        """Free experts, threads and files. What is being computed ends at its next layer; every use raises ModelClosed.

        May be called again, and from any thread or signal handler. How often each expert was used is kept beside the
        store, where that may be written, for the next `load`. A model that is dropped is freed, too, without that note.
        """
        was_open = self._hierarchy.lifecycle.is_open
        self._hierarchy.close()
        if was_open:
            remember(self._hierarchy, self.store.path)

    __reduce_ex__ = refuse_to_save  # pickle and copy

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    source: str | Path = DEMO,
    *,
    vram: str | int | None = None,
    ram: str | int | None = None,
    context: int | None = None,
    codec: str | None = None,
    dense_codec: str | None = None,
    policy: str = DEFAULT_POLICY,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    exact: bool = False,
    prefetch: int = DEFAULT_DEPTH,
    hybrid: Hybrid = "auto",
    fast_path: bool = True,
    revision: str | None = None,
    token: str | None = None,
    follow_links: bool = False,
    progress: Report = silent,
) -> Model:
    """Load a store, a checkpoint folder, a hub id, or the embedded demo model.

    A checkpoint is converted to a store in the user's cache folder first, once. `codec` and `dense_codec` are for that
    conversion; a store keeps its own. codec: None takes mxfp4 for a checkpoint in MXFP4 and nf4 for any other.

    dense_codec: None keeps dense weights in bf16 on disk, and in memory takes what fits: bf16 or int8 on a device, int8
    on the CPU (bf16 where `codec` or the store is bf16 throughout or `exact` is asked for), nf4 only where nothing else
    fits. "bf16" keeps them as they are everywhere.
    vram, ram: sizes such as ``"10GiB"`` that the process may use; None takes 90% of what is free.
    context: tokens of prompt and answer that memory is set aside for; None takes what fits, 8,192 at most.
    device: None takes the accelerator when there is one. dtype: "fp32", "bf16" or "fp16"; None takes bf16 on a device
    that has it, fp16 on an older one, fp32 on the CPU.
    exact: CPU kernels keep activations in full precision, slower. A bf16 store gives eager's bits with it, and in fp32.
    fast_path: decode steps without the detours of the model's own code, see `offload_moe.decode`.
    hybrid: with a device, whether the CPU computes some of the misses while others are copied: "auto" where kernels and
    codec allow it, "on" or an error, "off" for results that never depend on where an expert was.
    prefetch: MoE layers to look ahead; 0 turns prefetch and warm starts off. It also turns itself off while it does not
    pay.
    follow_links: see `quantize`.

    Raises:
        OffloadMoeError: one of its kinds, see `offload_moe.errors`.
    """
    use_torch_after_fork()
    check_policy(policy)
    check_context(context)
    ram_bytes = None if ram is None else parse_size(ram)
    vram_bytes = None if vram is None else parse_size(vram)
    where = compute_device("cpu" if vram_bytes == 0 and device is None else device)
    on_disk = dense_codec or LOSSLESS
    gc.collect()  # a model that was dropped
    give_back_freed_memory()  # of a conversion in this process
    notices: list[str] = []
    path = ensure_store(
        source,
        codec=codec,
        dense_codec=on_disk,
        revision=revision,
        token=token,
        report=progress,
        follow_links=follow_links,
        on_notice=notices.append,
    )
    store = Store.open(path)
    store.read_ahead()
    progress("Planning memory")
    give_back_freed_memory()
    forget_peak()
    computed_in = compute_dtype(dtype, where)
    skeleton = skeleton_of(store, computed_in)
    keeps_bits = keeps_eagers_bits(store.codec, where, computed_in, is_exact=exact)
    shape = describe_skeleton(skeleton, is_fast_path=fast_path and not keeps_bits)
    machine = measure_load(where, vram=vram_bytes, ram=ram_bytes, dtype=computed_in)
    placement = fit(store, shape, machine, context=context, dense_codec=dense_codec, is_exact=exact)
    progress("Loading dense weights")
    assembled = assemble(
        store,
        where,
        computed_in,
        dense_codec=None if placement.dense_codec == store.dense_codec else placement.dense_codec,
        mode="exact" if exact else "fast",
        skeleton=skeleton,
    )
    with _closed_on_error(_make_hierarchy(store, placement, where, policy)) as hierarchy:
        _refuse_once_closed(assembled.hf, hierarchy)
        refuse_saving(assembled.hf)
        attach_experts(
            assembled, store, hierarchy, where, dtype=computed_in, is_exact=exact, prefetch=prefetch, hybrid=hybrid
        )
        if prefetch:
            warm_start(hierarchy, store.path)
        report = None
        if fast_path:
            report = make_fast(assembled.hf, is_exact=keeps_bits, context=placement.context, hierarchy=hierarchy)
        if computed_in == torch.float16:
            watch_overflow(assembled.hf)
        watch_ids(assembled.hf)
        recompute_of(assembled.hf)
        resize = partial(hierarchy.resize, "vram" if placement.vram else "ram")
        room = ContextRoom(shape, computed_in, placement, resize, lends=may_lend(assembled.hf, shape, placement))
        assembled.hf.get_decoder().register_forward_pre_hook(room.before_forward, with_kwargs=True)
        tokenizer = load_tokenizer(store.path)
        model = Model(store, assembled, tokenizer, hierarchy, placement, room, summary(shape, placement))
    model.fast_path = report
    notices += assembled.notices
    notices += tokenizer_notices(tokenizer[0], assembled.hf) if tokenizer[0] is not None else []
    model.notices += [text for text in dict.fromkeys(notices) if text != tokenizer[1]]  # which `chat` raises
    model.notices += notices_of_budget(where, vram=vram_bytes, ram=ram_bytes)
    if where.type == "cpu" and device is None and vram_bytes != 0 and (notice := notice_of_unused_card()):
        model.notices.append(notice)
    for notice in model.notices:
        warnings.warn(notice, UserWarning, stacklevel=2)
    if report is not None and report.is_worth_a_notice:
        model.notices.append(str(report))  # nothing is wrong with it, so it is no warning
    return model


def _make_hierarchy(store: Store, placement: Placement, device: torch.device, policy: str) -> Hierarchy:
    pools = Pools(
        num_layers=len(store.layers),
        num_experts=store.num_experts,
        slot_bytes=placement.ram.slot_bytes,
        num_ram_slots=placement.ram.num_slots,
        num_device_slots=placement.vram.num_slots if placement.vram else 0,
        policy=policy,
    )
    copier = AcceleratorCopier(device) if placement.vram else None
    return Hierarchy(
        pools, lambda arena: DiskMover(arena, lambda key: store.record(*divmod(key, store.num_experts))), copier
    )


@contextmanager
def _closed_on_error(hierarchy: Hierarchy) -> Iterator[Hierarchy]:
    try:
        yield hierarchy
    except BaseException:
        hierarchy.close()
        raise


def _refuse_once_closed(hf: Any, hierarchy: Hierarchy) -> None:
    """Before anything is computed; the experts themselves refuse, too."""
    encoder = [hf.get_encoder()] if hf.config.is_encoder_decoder else []
    for module in (*encoder, hf.get_decoder()):
        module.register_forward_pre_hook(lambda *_: hierarchy.lifecycle.begin_forward())


def attach_experts(
    assembled: Assembled,
    store: Store,
    hierarchy: Hierarchy,
    device: torch.device,
    *,
    dtype: torch.dtype,
    is_exact: bool,
    prefetch: int,
    hybrid: Hybrid = "off",
) -> None:
    """Bind every MoE layer of the model to the hierarchy.

    Raises: ConfigError when `hybrid` is on and cannot be.
    """
    codec = get_codec(store.codec)
    lookahead = None
    if prefetch and not hierarchy.holds_every_expert:
        probes = find_probes(assembled.hf, assembled.layers)
        lookahead = Lookahead(probes, hierarchy.scheduler, PrefetchGovernor(), prefetch, hierarchy.ram)
    bind = HybridBinder(hierarchy, codec, hybrid, lookahead) if hierarchy.num_slots("vram") else None
    bound = []
    for ordinal, layer in enumerate(assembled.layers):
        arithmetic = choose_arithmetic(layer.contract, layer.shape, codec, device, dtype=dtype, is_exact=is_exact)
        split = bind(ordinal, layer, arithmetic) if bind is not None else None
        bound.append(
            split
            or BoundExperts(ordinal, layer.num_experts, hierarchy.scheduler, hierarchy.record_of, arithmetic, lookahead)
        )
    attach(assembled.layers, bound)
