"""`load`: from the name of a source to a model that answers."""

import gc
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Unpack

import torch

from offload_moe.chat.recompute import recompute_of
from offload_moe.checkpoint.token_ids import num_embeddings, watch_ids
from offload_moe.checkpoint.tokenizer import load_tokenizer, tokenizer_notices
from offload_moe.convert.jobs import LOSSLESS
from offload_moe.convert.sources import ensure_store
from offload_moe.decode import make_fast, make_room, why_no_rows
from offload_moe.engine.assemble import skeleton_of
from offload_moe.engine.build import Blueprint, Engine, build, closed_on_error, pools_of
from offload_moe.engine.device_pass import DevicePass, install_device_pass, open_device_pass, report_of
from offload_moe.engine.draft import DraftFiles, find_draft, load_draft
from offload_moe.engine.model import Model
from offload_moe.engine.mtp import find_module, place_mtp
from offload_moe.engine.options import LoadKeywords, LoadOptions
from offload_moe.engine.overflow import watch_overflow
from offload_moe.errors import ConfigError
from offload_moe.experts.arithmetic import keeps_eagers_bits
from offload_moe.families.text_model import MtpModel, TextModel
from offload_moe.memory.copier import AcceleratorCopier, compute_device
from offload_moe.memory.unused_card import notice_of_unused_card
from offload_moe.native.kernels import MAX_ROWS, use_torch_after_fork
from offload_moe.plan.attention import with_earlier_states
from offload_moe.plan.budget import forget_peak, give_back_freed_memory
from offload_moe.plan.fit import fit, measure_load, notices_of_budget, summary
from offload_moe.plan.machine import compute_dtype
from offload_moe.plan.parameters import ModelShape, describe_skeleton
from offload_moe.plan.placement import Placement, Settings, why_no_device_pass
from offload_moe.plan.room import ContextRoom, may_borrow
from offload_moe.plan.stored import why_on_the_cpu
from offload_moe.residency.popularity import warm_start
from offload_moe.speculate.choice import Choice
from offload_moe.speculate.draft import DraftSource
from offload_moe.speculate.mtp import FinalStates, MtpModule, MtpSource
from offload_moe.speculate.ngram import NgramSource
from offload_moe.speculate.speculation import Makers, Speculation, set_speculation, speculation_of
from offload_moe.store import Store
from offload_moe.store.in_place import GGUF
from offload_moe.system.lifecycle import has_loaded
from offload_moe.system.names import DEMO
from offload_moe.system.progress import Progress, silent

UNLESS_NAMED = "GGUF files are computed on the CPU unless a device is named: --device cuda."


def load(
    source: str | Path = DEMO,
    options: LoadOptions | None = None,
    *,
    progress: Progress = silent,
    **keywords: Unpack[LoadKeywords],
) -> Model:
    """Load a store, a checkpoint folder, a hub id, or the embedded demo model.

    options: a `LoadOptions`; keywords are its fields, and replace those of `options`.

    Raises:
        OffloadMoeError: one of its kinds, see `offload_moe.errors`.
    """
    use_torch_after_fork()
    chosen = _options(options, keywords)
    store, conversion_notices = _open_store(source, chosen, progress)
    device = _device_for(store, chosen)
    progress("Planning memory")
    draft = None if chosen.draft is None else find_draft(chosen.draft, token=chosen.token)
    planned = _plan(store, chosen, device, draft)
    why_off = planned.why_no_pass if planned.placement.vram else "its experts have no slots in VRAM"
    device_pass = open_device_pass(device, why_off=why_off)
    progress("Loading dense weights")
    engine = build(store, _blueprint(store, chosen, planned, device_pass), planned.skeleton, planned.mtp)
    with closed_on_error(engine.hierarchy):
        model = _make_model(store, chosen, planned, engine, device_pass, progress)
        _speculate(model, chosen, draft, is_planned=planned.has_memory_for(chosen.speculate))
    of_machine = [*_notices_of_machine(store, chosen, device), *device_pass.notices]
    _notify(model, [*conversion_notices, *engine.notices], of_machine)
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A model still on the meta device, and the plan of its memory. keeps_bits: results have eager's bits.

    mtp: its layer for multi-token prediction; None where that is not loaded. why_no_pass: why decode does not take the
    device pass; empty where the plan counts it. draft_token_bytes: keys and values of a draft model; 0 without one.
    """

    skeleton: TextModel
    mtp: MtpModel | None
    device: torch.device
    dtype: torch.dtype
    keeps_bits: bool
    shape: ModelShape
    placement: Placement
    why_no_pass: str
    draft_token_bytes: int

    def has_memory_for(self, choice: Choice) -> bool:
        """Whether answers may guess: not with "off", where layers keep the states before guesses, too."""
        return choice != "off" or not any(layer.earlier for layer in self.shape.attention.cache_layers)


def _options(options: LoadOptions | None, keywords: LoadKeywords) -> LoadOptions:
    if not isinstance(options, LoadOptions | None):
        raise ConfigError(
            f"options is {type(options).__name__}, not LoadOptions. Use load(source, **keywords) instead."
        )
    return (options or LoadOptions()).updated(keywords)


def _device_for(store: Store, options: LoadOptions) -> torch.device:
    """Where the model is computed. Raises: ConfigError for a device that has no kernels for the store's types."""
    if (why := why_on_the_cpu(store)) is not None:
        if options.device not in (None, "cpu"):
            raise ConfigError(f"{why} Leave --device {options.device} out to use the CPU.")
        return compute_device("cpu")
    if store.codec == GGUF and options.device is None:
        return compute_device("cpu")
    return compute_device("cpu" if options.vram_bytes == 0 and options.device is None else options.device)


def _open_store(source: str | Path, options: LoadOptions, progress: Progress) -> tuple[Store, list[str]]:
    """The store of a source, converted where necessary, and messages about the conversion for the user."""
    if has_loaded():
        gc.collect()  # frees a model that was dropped
    give_back_freed_memory()  # left by a conversion in this process
    notices: list[str] = []
    path = ensure_store(
        source,
        codec=options.codec,
        dense_codec=options.dense_codec or LOSSLESS,
        revision=options.revision,
        token=options.token,
        progress=progress,
        follow_links=options.follow_links,
        on_notice=notices.append,
    )
    store = Store.open(path)
    store.read_ahead()
    return store, [*notices, *store.notices]


def _speculate(model: Model, options: LoadOptions, draft: DraftFiles | None, *, is_planned: bool) -> None:
    """Choose how tokens are guessed. Raises: ConfigError where the draft has another vocabulary.

    is_planned: as of `Speculation`.
    """
    hf = model.hf
    sources: dict[Choice, Makers] = {}
    if model.engine.mtp is not None:
        module = MtpModule(model.engine.mtp, num_embeddings(hf))
        of_mtp = partial(MtpSource, module, FinalStates(hf.get_decoder()))
        sources |= {"mtp": (of_mtp,), "auto": (NgramSource, of_mtp)}
    if draft is not None and not why_no_rows(hf):
        if model.tokenizer is None:
            raise ConfigError(f"{model.no_tokenizer} Without one, its vocabulary cannot be compared with a draft's.")
        guessing = load_draft(draft, model.tokenizer.get_vocab(), model.placement.context)
        sources["draft"] = (NgramSource, partial(DraftSource, guessing, num_embeddings(hf)))
    why_off = ""
    if options.speculate == "mtp" and "mtp" not in sources:
        why_off = "the layer for multi-token prediction is computed on the CPU alone; --speculate ngram works here"
    set_speculation(
        hf, Speculation(hf, options.speculate, model.stats, sources, why_off=why_off, is_planned=is_planned)
    )


def _plan(store: Store, options: LoadOptions, device: torch.device, draft: DraftFiles | None) -> Planned:
    give_back_freed_memory()
    forget_peak()
    dtype = compute_dtype(options.dtype, device)
    skeleton = skeleton_of(store, dtype)
    keeps_bits = keeps_eagers_bits(store.codec, device, dtype, is_exact=options.exact)
    shape = describe_skeleton(skeleton, is_fast_path=options.fast_path and not keeps_bits)
    machine = measure_load(device, vram=options.vram_bytes, ram=options.ram_bytes, dtype=dtype)
    wants_pass = options.device_pass != "off" and options.fast_path
    settings = Settings(codec=store.codec, is_exact=options.exact, device_pass=wants_pass)
    why_no_pass = why_no_device_pass(shape, machine, settings)
    place = partial(
        fit,
        store,
        machine=machine,
        context=options.context,
        dense_codec=options.dense_codec,
        is_exact=options.exact,
        draft_bytes=None if draft is None else draft.num_bytes,
        device_pass=not why_no_pass,
    )
    takes_guesses = device.type == "cpu" and dtype == torch.float32 and options.fast_path and not keeps_bits
    takes_pass = device.type == "cuda" and not why_no_pass
    if takes_guesses or takes_pass:  # one state where passes are shared, of which the last token is taken back
        number = 1 if options.speculate == "off" else MAX_ROWS
        shape = replace(shape, attention=with_earlier_states(shape.attention, number))
    mtp = find_module(store, options, dtype) if takes_guesses or options.speculate == "mtp" else None
    if mtp is not None and takes_guesses:
        mtp, shape, placement = place_mtp(shape, mtp, options, place)
    else:
        mtp, placement = None, place(shape)
    return Planned(
        skeleton=skeleton,
        mtp=mtp,
        device=device,
        dtype=dtype,
        keeps_bits=keeps_bits,
        shape=shape,
        placement=placement,
        why_no_pass=why_no_pass,
        draft_token_bytes=0 if draft is None else draft.token_bytes,
    )


def _blueprint(store: Store, options: LoadOptions, planned: Planned, device_pass: DevicePass) -> Blueprint:
    placement = planned.placement
    return Blueprint(
        pools=pools_of(
            store,
            slot_bytes=placement.ram.slot_bytes,
            num_ram_slots=placement.ram.num_slots,
            num_device_slots=placement.vram.num_slots if placement.vram else 0,
            policy=options.policy,
            has_mtp=planned.mtp is not None,
        ),
        device=planned.device,
        dtype=planned.dtype,
        make_copier=partial(AcceleratorCopier, planned.device) if placement.vram else None,
        dense_codec=None if placement.dense_codec == store.dense_codec else placement.dense_codec,
        is_exact=options.exact,
        prefetch=options.prefetch,
        hybrid=options.hybrid,
        in_panels=device_pass.card is not None,
    )


def _make_model(
    store: Store,
    options: LoadOptions,
    planned: Planned,
    engine: Engine,
    device_pass: DevicePass,
    progress: Progress,
) -> Model:
    """Warm the slots up, install the fast path, and the checks of token ids and overflow."""
    hf, hierarchy, placement = engine.hf, engine.hierarchy, planned.placement
    if options.prefetch:
        warm_start(hierarchy, store.path)
    report = None
    cache_dtype = torch.bfloat16 if device_pass.card is not None else placement.cache_dtype
    kept = cache_dtype if cache_dtype != planned.dtype else None
    if options.fast_path:
        fast = partial(make_fast, context=placement.context, kept=kept, hierarchy=hierarchy)
        report = fast(hf, is_exact=planned.keeps_bits)
        if engine.mtp is not None:
            fast(engine.mtp, is_exact=planned.keeps_bits)
    elif kept is not None:
        make_room(hf, placement.context, kept)
    install_device_pass(device_pass, store, engine, placement.context, progress)
    if report is not None and device_pass.made is not None:
        report = report_of(report)
    if planned.dtype == torch.float16:
        watch_overflow(hf)
    watch_ids(hf)
    recompute_of(hf)
    tokenizer, room = load_tokenizer(store.path), _make_room(planned, engine)
    line = summary(planned.shape, placement) + ("" if engine.mtp is None else "; with multi-token prediction")
    model = Model(store, engine, tokenizer, placement, room, line)
    model.fast_path = report
    return model


def _make_room(planned: Planned, engine: Engine) -> ContextRoom:
    """Room for contexts, made before each forward of the decoder."""
    resize = partial(engine.hierarchy.resize, "vram" if planned.placement.vram else "ram")
    borrows = may_borrow(engine.hf, planned.shape, planned.placement)
    room = ContextRoom(
        planned.shape,
        planned.dtype,
        planned.placement,
        resize,
        borrows=borrows,
        draft_token_bytes=planned.draft_token_bytes,
    )
    if planned.placement.vram:
        room.watch(engine.hierarchy.device_memory)
    engine.hf.get_decoder().register_forward_pre_hook(room.before_forward, with_kwargs=True)
    return room


def _notices_of_machine(store: Store, options: LoadOptions, device: torch.device) -> list[str]:
    notices = notices_of_budget(device, vram=options.vram_bytes, ram=options.ram_bytes)
    if device.type == "cpu" and options.device is None and options.vram_bytes != 0:
        why = why_on_the_cpu(store) or (UNLESS_NAMED if store.codec == GGUF else None)
        notices += [notice] if (notice := notice_of_unused_card(why=why)) else []
    return notices


def _notify(model: Model, of_model: Iterable[str], of_machine: Iterable[str]) -> None:
    """Keep the messages for the user on the model, and warn of each."""
    of_tokenizer = tokenizer_notices(model.tokenizer, model.hf) if model.tokenizer is not None else []
    unique = dict.fromkeys([*of_model, *of_tokenizer])
    model.notices += [text for text in unique if text != model.no_tokenizer]  # `chat` raises that one
    model.notices += of_machine
    for notice in model.notices:
        warnings.warn(notice, UserWarning, stacklevel=3)
    speculation, report = speculation_of(model.hf), model.fast_path
    if speculation.choice in ("ngram", "mtp", "draft") and speculation.why_off:
        model.notices.append(f"No tokens are guessed: {speculation.why_off}.")
    if report is not None and report.is_worth_a_notice:
        model.notices.append(str(report))  # the slow path is no fault, so it is no warning
