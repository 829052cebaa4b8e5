"""The placement: the fixed content of each memory, and the number of expert slots in the rest.

`offload-moe plan` and `load` share this code.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from offload_moe.convert.jobs import LOSSLESS
from offload_moe.native.planes import not_in_panels_reason
from offload_moe.plan.budget import DEVICE_RESERVE_BYTES, runtime_bytes
from offload_moe.plan.card_pass import GRAPH_NODE_BYTES, PassShape
from offload_moe.plan.machine import Machine
from offload_moe.plan.parameters import ModelShape
from offload_moe.plan.sizes import dense_memory_bytes, dense_store_bytes, experts_bytes, slot_bytes
from offload_moe.plan.working import activation_bytes, cache_bytes, tile_bytes
from offload_moe.system.sizes import format_size

DENSE_CODECS = (LOSSLESS, "int8", "nf4")  # from the most exact to the smallest
LAST_RESORT = "nf4"  # costs quality, see docs/decisions/060
DEFAULT_CONTEXT, LEAST_CONTEXT = 8192, 1024  # tokens, if no context is given


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The user's settings. context: tokens; None takes as many as fit, at most 8,192.

    dense_codec: of dense weights in memory; None takes the most exact one that fits. stored_dense_codec: on disk.
    is_exact: the CPU rounds dense weights only if `dense_codec` is given, and no keys and values.
    draft_bytes: of a draft model by the length of the context, which takes RAM of its own; None without one.
    device_pass: decode takes the device pass where the model has one.
    """

    codec: str
    context: int | None = None
    dense_codec: str | None = None
    stored_dense_codec: str = LOSSLESS
    is_exact: bool = False
    draft_bytes: Callable[[int], int] | None = None
    device_pass: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One use of a memory. detail: such as a codec."""

    name: str
    num_bytes: int
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One memory. fixed: its parts without slots; the rest of the budget is `num_slots` expert slots.

    budget_bytes: None if unknown. least_bytes: the minimum, one slot included.
    """

    name: str
    budget_bytes: int | None
    fixed: tuple[Part, ...]
    num_slots: int = 0
    slot_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        return sum(part.num_bytes for part in self.fixed)

    @property
    def least_bytes(self) -> int:
        return self.bytes_with(1)

    @property
    def used_bytes(self) -> int:
        return self.bytes_with(self.num_slots)

    def bytes_with(self, num_slots: int) -> int:
        """The budget with exactly `num_slots` slots."""
        return self.fixed_bytes + num_slots * self.slot_bytes

    @property
    def missing_bytes(self) -> int:
        """The bytes that are missing; 0 if it fits."""
        return 0 if self.budget_bytes is None else max(0, self.least_bytes - self.budget_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """All memories; `vram` is None without a device. Every expert in VRAM has its copy in the RAM tier or on disk.

    context, dense_codec: the chosen settings. cache_dtype: of keys and values.
    """

    vram: Tier | None
    ram: Tier
    disk: Tier
    context: int
    dense_codec: str
    cache_dtype: torch.dtype

    @property
    def tiers(self) -> tuple[Tier, ...]:
        return (self.vram, self.ram, self.disk) if self.vram is not None else (self.ram, self.disk)

    @property
    def fast(self) -> Tier:
        """The tier that experts are computed from."""
        return self.vram or self.ram

    @property
    def warning(self) -> str:
        """A warning about the chosen settings; empty if there is none."""
        return "nf4 dense weights cost quality" if self.dense_codec == LAST_RESORT else ""

    @property
    def fits(self) -> bool:
        return not any(tier.missing_bytes for tier in self.tiers)


def place(shape: ModelShape, machine: Machine, settings: Settings, *, download_bytes: int, is_store: bool) -> Placement:
    """Place a model. download_bytes: still to be downloaded. is_store: nothing more has to be written to disk.

    Settings that are not given are chosen in steps: from 1,024 tokens and the smallest dense codec, to twice the
    context or a more exact codec, whichever needs less memory, up to 8,192 tokens, as long as one expert slot is left
    in the fast tier; a step from int8 to bf16 must leave slots for the top-k experts of every layer.
    """
    vram, ram, context, dense_codec = _settle(shape, machine, settings)
    to_write = () if is_store else _store_parts(shape, settings.codec, settings.stored_dense_codec)
    to_fetch = (Part(name="download", num_bytes=download_bytes),) if download_bytes else ()
    disk = Tier(name="disk", budget_bytes=machine.disk_bytes, fixed=(*to_write, *to_fetch))
    return Placement(
        vram=vram,
        ram=ram,
        disk=disk,
        context=context,
        dense_codec=dense_codec,
        cache_dtype=cache_dtype(machine, settings),
    )


def cache_dtype(machine: Machine, settings: Settings) -> torch.dtype:
    """Of keys and values: the CPU keeps those of a quantized store in bf16, see docs/decisions/066-narrow-cache.md."""
    is_rounded = settings.codec != LOSSLESS and not settings.is_exact
    is_on_cpu = not machine.has_device and machine.dtype == torch.float32
    return torch.bfloat16 if is_rounded and is_on_cpu else machine.dtype


def why_no_device_pass(shape: ModelShape, machine: Machine, settings: Settings) -> str:
    """Why decode does not take the device pass; empty where it does."""
    if not machine.has_device:
        return "there is no card"
    if not settings.device_pass:
        return "it is off"
    if settings.is_exact:
        return "its numbers are kept bit for bit"
    if machine.dtype == torch.float16:
        return "it computes in fp16, for which there are no kernels there"
    if isinstance(shape.device_pass, str):
        return shape.device_pass
    return not_in_panels_reason(settings.codec) or ""


def dense_codecs(machine: Machine, settings: Settings) -> tuple[str, ...]:
    """The possible codecs of dense weights in memory, the most exact first.

    The CPU reads an fp32 copy of a bf16 weight at 4 bytes per token and an int8 record at 1, without a measurable
    loss. A store whose experts are lossless stays lossless.
    """
    if settings.stored_dense_codec != LOSSLESS:
        return (settings.stored_dense_codec,)
    if settings.dense_codec is not None:
        return (settings.dense_codec,)
    if settings.codec == LOSSLESS:
        return (LOSSLESS,)
    if machine.has_device:
        return DENSE_CODECS
    return DENSE_CODECS[1:] if not settings.is_exact else (LOSSLESS,)


def _settle(shape: ModelShape, machine: Machine, settings: Settings) -> tuple[Tier | None, Tier, int, str]:
    """Raise the settings that are not given in steps, from the least of each, by the step that needs less memory.

    One order of steps for all machines: more memory gives neither a shorter context nor coarser weights.
    """
    codecs, contexts = dense_codecs(machine, settings)[::-1], _contexts(shape, settings)
    chosen = _Choice(shape, machine, settings, contexts[0], codecs[0])
    while steps := [_Choice(shape, machine, settings, *step) for step in _steps(chosen, contexts, codecs)]:
        step = min(steps, key=lambda step: step.needed_bytes)
        if step.needed_bytes > (step.fast.budget_bytes or 0):
            break
        chosen = step
    return chosen.vram, chosen.ram, chosen.context, chosen.dense_codec


class _Choice:
    """The memories with one context and one dense codec."""

    def __init__(self, shape: ModelShape, machine: Machine, settings: Settings, context: int, dense_codec: str) -> None:
        self.context, self.dense_codec = context, dense_codec
        self.vram, self.ram = _memories(shape, machine, settings, context, dense_codec)
        self.fast = self.vram or self.ram
        # Slots for the top-k experts of every layer are worth more than bf16 instead of int8.
        is_luxury = dense_codec == LOSSLESS and len(dense_codecs(machine, settings)) > 1
        top_k = sum(min(shape.top_k, layer.num_experts) for layer in shape.layers)
        self.needed_bytes = self.fast.bytes_with(top_k if is_luxury else 1)


def _steps(chosen: _Choice, contexts: tuple[int, ...], codecs: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """A longer context, or a more exact dense codec."""
    longer, finer = contexts.index(chosen.context) + 1, codecs.index(chosen.dense_codec) + 1
    if longer < len(contexts):
        yield contexts[longer], chosen.dense_codec
    if finer < len(codecs):
        yield chosen.context, codecs[finer]


def _contexts(shape: ModelShape, settings: Settings) -> tuple[int, ...]:
    """The possible contexts, in tokens, ascending."""
    if settings.context is not None:
        return (settings.context,)
    longest = min(DEFAULT_CONTEXT, shape.max_context or DEFAULT_CONTEXT)
    shorter = [DEFAULT_CONTEXT >> halvings for halvings in (3, 2, 1)]
    return (*(context for context in shorter if LEAST_CONTEXT <= context < longest), longest)


def _memories(
    shape: ModelShape, machine: Machine, settings: Settings, context: int, dense_codec: str
) -> tuple[Tier | None, Tier]:
    model = _model_parts(shape, machine, settings, context, dense_codec)
    in_ram = (Part(name="runtime", num_bytes=runtime_bytes(shape.vocabulary)), *_draft_parts(settings, context))
    if not machine.has_device:
        return None, _fill("RAM", machine.ram_bytes, (*model, *in_ram), shape, settings.codec)
    on_device = (
        Part(name="device context and workspaces", num_bytes=DEVICE_RESERVE_BYTES),
        *_pass_parts(shape, machine, settings, context),
    )
    return (
        _fill("VRAM", machine.vram_bytes, (*model, *on_device), shape, settings.codec),
        _fill("RAM", machine.ram_bytes, in_ram, shape, settings.codec),
    )


def _pass_parts(shape: ModelShape, machine: Machine, settings: Settings, context: int) -> tuple[Part, ...]:
    """Graphs and buffers of the device pass."""
    if why_no_device_pass(shape, machine, settings):
        return ()
    assert isinstance(shape.device_pass, PassShape)
    nodes = shape.device_pass.graph_nodes
    return (
        Part(
            name="graphs of the device pass",
            num_bytes=nodes * GRAPH_NODE_BYTES,
            detail=f"{nodes:,} nodes of {format_size(GRAPH_NODE_BYTES)}",
        ),
        Part(
            name="buffers of the device pass",
            num_bytes=shape.device_pass.buffer_bytes(context, shape.num_experts),
        ),
    )


def _draft_parts(settings: Settings, context: int) -> tuple[Part, ...]:
    if settings.draft_bytes is None:
        return ()
    return (Part(name="draft model", num_bytes=settings.draft_bytes(context), detail=f"{context:,} tokens"),)


def _model_parts(
    shape: ModelShape, machine: Machine, settings: Settings, context: int, dense_codec: str
) -> tuple[Part, ...]:
    """The parts of the memory in which the model computes."""
    dtype, kept = machine.dtype, cache_dtype(machine, settings)
    tiles = tile_bytes(shape, settings.codec, dense_codec, dtype, has_device=machine.has_device)
    dense_bytes = dense_memory_bytes(shape, dense_codec, dtype, stored=settings.stored_dense_codec)
    return (
        Part(name="dense weights", num_bytes=dense_bytes, detail=dense_codec),
        Part(
            name="key/value cache",
            num_bytes=cache_bytes(shape, context, dtype, kept=kept),
            detail=_cache_detail(shape, context),
        ),
        Part(name="activations", num_bytes=activation_bytes(shape, context, dtype, kept=kept)),
        Part(name="dequantized tiles", num_bytes=tiles),
    )


def _cache_detail(shape: ModelShape, context: int) -> str:
    is_complete = all(layer.is_complete for layer in shape.attention.cache_layers)
    return f"{context:,} tokens" + ("" if is_complete else ", without recurrent states")


def _store_parts(shape: ModelShape, codec: str, dense_codec: str) -> tuple[Part, ...]:
    return (
        Part(name="experts", num_bytes=experts_bytes(shape, codec), detail=codec),
        Part(name="dense weights", num_bytes=dense_store_bytes(shape, dense_codec), detail=dense_codec),
    )


def _fill(name: str, budget: int, fixed: tuple[Part, ...], shape: ModelShape, codec: str) -> Tier:
    each = slot_bytes(shape, codec)
    room = budget - sum(part.num_bytes for part in fixed)
    return Tier(
        name=name,
        budget_bytes=budget,
        fixed=fixed,
        num_slots=min(max(0, room // each), shape.num_experts),
        slot_bytes=each,
    )
