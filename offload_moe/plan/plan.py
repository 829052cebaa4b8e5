"""The plan itself: one model, one machine, one choice of settings."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from offload_moe.convert.jobs import LOSSLESS
from offload_moe.errors import ConfigError
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.plan.advice import Change, Shortfall, best_changes, find_shortfalls
from offload_moe.plan.attention import with_earlier_states
from offload_moe.plan.machine import Machine
from offload_moe.plan.mtp import MtpCost, mtp_cost
from offload_moe.plan.outlook import Outlook, Task, look_ahead
from offload_moe.plan.parameters import ModelShape, describe_model
from offload_moe.plan.placement import DENSE_CODECS, Placement, Settings, why_no_device_pass
from offload_moe.plan.sizes import (
    checkpoint_estimate,
    expert_codecs,
    store_bytes_per_codec,
    with_narrow_embeddings,
)
from offload_moe.plan.source import PlannedSource, open_source
from offload_moe.plan.speed import Speed
from offload_moe.plan.stored import as_stored, why_on_the_cpu
from offload_moe.quant import get_codec, is_built_in
from offload_moe.store import Store
from offload_moe.store.in_place import GGUF


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes, placement and speed of a model. `checkpoint_is_exact`: from the files or their index, not from the dtype.

    store_bytes: codec of the experts -> bytes on disk. changes: faster settings, the most effective first. mtp: None
    without a layer for multi-token prediction, which the other figures leave out.
    """

    name: str
    shape: ModelShape
    machine: Machine
    settings: Settings
    checkpoint_bytes: int
    checkpoint_is_exact: bool
    store_bytes: dict[str, int]
    placement: Placement
    speed: Speed | None
    changes: tuple[Change, ...]
    shortfalls: tuple[Shortfall, ...]
    mtp: MtpCost | None

    @property
    def fits(self) -> bool:
        return not self.shortfalls

    @property
    def why_no_device_pass(self) -> str:
        """Why decode does not take the device pass; empty where it does."""
        return why_no_device_pass(self.shape, self.machine, self.settings)


def make_plan(
    model: str | Path,
    machine: Machine,
    *,
    context: int | None = None,
    codec: str | None = None,
    dense_codec: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    draft_bytes: Callable[[int], int] | None = None,
    device_pass: bool = True,
    names_card: bool = False,
) -> Plan:
    """Plan a store, a checkpoint folder, a config file or a hub id. Only a hub id's config is downloaded.

    context: tokens; None takes as many as fit, at most 8,192 and the model's maximum. draft_bytes, device_pass: see
    `Settings`. names_card: the card computes a GGUF file, too, as with `--device cuda`.

    Raises:
        ConfigError: a codec or the context is not usable, or contradicts the store; a card has no kernels for a file.
        CheckpointError, UnsupportedModelError, TransferError: the model cannot be read; see `open_source`.
    """
    source = open_source(model, revision=revision, token=token)
    if source.store is not None:
        _agreed("--codec", codec, GGUF)
        _agreed("--dense-codec", dense_codec, GGUF)
        if not names_card:
            machine = replace(machine, vram_bytes=0)
        elif machine.has_device and (why := why_on_the_cpu(source.store)) is not None:
            raise ConfigError(f"{why} Leave --gpu and --vram out to plan for the CPU.")
        return _plan_of_types(source, source.store, machine, context, device_pass)
    suitable = expert_codecs(source.config)
    if codec is not None and not is_built_in(codec):
        suitable += (codec,)
    codec = _suitable("--codec", _agreed("--codec", codec, source.codec) or suitable[0], suitable)
    if source.dense_codec not in (None, LOSSLESS):
        dense_codec = _agreed("--dense-codec", dense_codec, source.dense_codec)
    _suitable("--dense-codec", dense_codec or LOSSLESS, DENSE_CODECS)
    stored = source.dense_codec or dense_codec or LOSSLESS
    if not is_built_in(codec):
        machine = replace(machine, vram_bytes=0)
    shape = describe_model(source.config, is_fast_path=_takes_fast_path(codec, machine), dense_names=source.dense_names)
    shape = with_narrow_embeddings(shape, lambda weight: weight.dtype == torch.bfloat16)
    check_context(context, shape)
    settings = Settings(
        codec=codec,
        context=context,
        dense_codec=dense_codec,
        stored_dense_codec=stored,
        draft_bytes=draft_bytes,
        device_pass=device_pass,
    )
    return _plan(source, shape, machine, settings)


def _plan_of_types(
    source: PlannedSource, store: Store, machine: Machine, context: int | None, device_pass: bool
) -> Plan:
    """The plan of a store in the types of a GGUF file."""
    shape = describe_model(source.config, dense_names=source.dense_names)
    check_context(context, shape)
    settings = Settings(codec=GGUF, context=context, stored_dense_codec=GGUF, device_pass=device_pass)
    return _plan(source, as_stored(shape, store), machine, settings)


def _plan(source: PlannedSource, shape: ModelShape, machine: Machine, settings: Settings) -> Plan:
    if not machine.has_device or not why_no_device_pass(shape, machine, settings):
        shape = replace(shape, attention=with_earlier_states(shape.attention, MAX_ROWS))
    estimate = checkpoint_estimate(shape, source.config)
    checkpoint_bytes = source.checkpoint_bytes if source.checkpoint_bytes is not None else estimate
    task = Task(
        shape=shape,
        machine=machine,
        settings=settings,
        download_bytes=0 if source.is_local else checkpoint_bytes,
        is_store=source.codec is not None,
        shard_bytes=source.shard_bytes,
    )
    outlook: Outlook = look_ahead(task)
    return Plan(
        name=source.name,
        shape=shape,
        machine=machine,
        settings=settings,
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_is_exact=source.checkpoint_bytes is not None,
        store_bytes=store_bytes_per_codec(
            shape,
            settings.stored_dense_codec,
            dict.fromkeys((*expert_codecs(source.config), settings.codec)) if settings.codec != GGUF else (GGUF,),
        ),
        placement=outlook.placement,
        speed=outlook.speed,
        changes=best_changes(task, outlook) if outlook.speed is not None else (),
        shortfalls=find_shortfalls(task, outlook),
        mtp=mtp_cost(source.config, source.tensor_names, machine, settings, outlook.placement)
        if source.has_mtp and settings.codec != GGUF
        else None,
    )


def _takes_fast_path(codec: str, machine: Machine) -> bool:
    """Whether `load`, by default, takes the whole fast path, whose numbers may differ in the last bits."""
    from offload_moe.experts.arithmetic import keeps_eagers_bits

    where = torch.device("cuda" if machine.has_device else "cpu")
    return not keeps_eagers_bits(codec, where, machine.dtype, is_exact=False)


def _agreed(flag: str, chosen: str | None, stored: str | None) -> str | None:
    if chosen is not None and stored is not None and chosen != stored:
        raise ConfigError(
            f"The store has {stored}; {flag} {chosen} needs another store. Quantize the model again for it."
        )
    return chosen or stored


def _suitable(flag: str, codec: str, suitable: tuple[str, ...]) -> str:
    get_codec(codec)
    if codec not in suitable:
        raise ConfigError(f"{flag} {codec} does not suit this model. Choose one of: {', '.join(suitable)}.")
    return codec


def check_context(context: int | None, shape: ModelShape | None = None) -> None:
    """Check a context. Raises: ConfigError when it is not a number of tokens, or above the model's maximum."""
    if context is None:
        return
    if not isinstance(context, int) or context < 1:
        raise ConfigError(f"A context of {context!r} tokens is not usable. It must be a whole number from 1.")
    if shape is None:
        return
    if shape.max_context is not None and context > shape.max_context:
        raise ConfigError(
            f"The model takes at most {shape.max_context:,} tokens, --context is {context:,}. Choose a shorter one."
        )
