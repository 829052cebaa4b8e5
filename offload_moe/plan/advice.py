"""Advice: the most effective change, and remedies for a model that does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from offload_moe.convert.jobs import LOSSLESS
from offload_moe.plan.outlook import Outlook, Task, look_ahead
from offload_moe.plan.placement import DENSE_CODECS, LAST_RESORT, Tier
from offload_moe.system.sizes import format_size, typed_size

WORTH_SAYING = 1.02  # smaller gains are below the error of the assumptions
CONTEXT_STEP = 1024
SHARDS_AT_ONCE = 2  # shards on the disk during a conversion that deletes them


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change, and the speed with it."""

    name: str
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortfall:
    """A memory that is too small: the missing bytes, and remedies, each of which is sufficient."""

    memory: str
    needed_bytes: int
    budget_bytes: int
    remedies: tuple[str, ...]

    @property
    def missing_bytes(self) -> int:
        return self.needed_bytes - self.budget_bytes


def explain(shortfall: Shortfall) -> str:
    """The shortfall and its remedies as text."""
    return (
        f"Does not fit: {shortfall.memory} lacks {format_size(shortfall.missing_bytes)} "
        f"({format_size(shortfall.needed_bytes)} needed, {format_size(shortfall.budget_bytes)} there). "
        f"It would fit with {' or '.join(shortfall.remedies)}."
    )


def best_changes(task: Task, outlook: Outlook) -> tuple[Change, ...]:
    """Changes that would raise the speed of decode, the most effective first; hardware is doubled."""
    changes = [
        Change(name=name, tokens_per_s=changed.tokens_per_s)
        for name, variant in _variants(task, outlook)
        if (changed := look_ahead(variant)).tokens_per_s > WORTH_SAYING * outlook.tokens_per_s
    ]
    return tuple(sorted(changes, key=lambda change: -change.tokens_per_s))


def find_shortfalls(task: Task, outlook: Outlook) -> tuple[Shortfall, ...]:
    """Every memory that is too small."""
    return tuple(
        Shortfall(
            memory=tier.name,
            needed_bytes=tier.least_bytes,
            budget_bytes=tier.budget_bytes or 0,
            remedies=tuple(_remedies(task, outlook, tier)),
        )
        for tier in outlook.placement.tiers
        if tier.missing_bytes
    )


def _variants(task: Task, outlook: Outlook) -> Iterator[tuple[str, Task]]:
    # The chosen settings stay: otherwise more memory could look slower because its plan is more exact.
    placement, machine = outlook.placement, task.machine
    settings = replace(task.settings, dense_codec=placement.dense_codec, context=placement.context)
    task = replace(task, settings=settings)
    for codec in _smaller_dense_codecs(task, outlook):
        yield _dense_codec_flag(codec), replace(task, settings=replace(settings, dense_codec=codec))
    if settings.codec != "nf4" and not task.is_store:
        yield "--codec nf4", replace(task, settings=replace(settings, codec="nf4"))
    if placement.context >= 2 * CONTEXT_STEP:
        half = placement.context // 2
        yield f"--context {half}", replace(task, settings=replace(settings, context=half))
    if machine.has_device:
        yield "twice the VRAM", replace(task, machine=replace(machine, vram_bytes=2 * machine.vram_bytes))
        link = replace(machine.rates, link=2 * machine.rates.link)
        yield "a link to the GPU twice as fast", replace(task, machine=replace(machine, rates=link))
    yield "twice the RAM", replace(task, machine=replace(machine, ram_bytes=2 * machine.ram_bytes))
    disk = replace(machine.rates, disk=2 * machine.rates.disk)
    yield "a disk twice as fast", replace(task, machine=replace(machine, rates=disk))


def _remedies(task: Task, outlook: Outlook, tier: Tier) -> Iterator[str]:
    settings = task.settings
    if tier.name == "disk":
        if task.shard_bytes is not None:
            needed = tier.least_bytes - task.download_bytes + SHARDS_AT_ONCE * task.shard_bytes
            if needed <= (tier.budget_bytes or 0):
                yield f"offload-moe quantize --delete-source-shards (about {format_size(needed)} needed)"
        yield f"{format_size(tier.missing_bytes)} more free space"
        return
    for codec in _smaller_dense_codecs(task, outlook):
        if _has_room(replace(task, settings=replace(settings, dense_codec=codec)), tier.name):
            yield _dense_codec_flag(codec)
            break
    smaller = replace(task, settings=replace(settings, codec="nf4"))
    if settings.codec != "nf4" and not task.is_store and _has_room(smaller, tier.name):
        yield "--codec nf4"
    if context := _largest_context(task, outlook.placement.context, tier.name):
        yield f"--context {context}"
    if tier.name == "VRAM" and _has_room(replace(task, machine=replace(task.machine, vram_bytes=0)), "RAM"):
        yield "--vram 0 (everything in RAM)"
    yield f"--{tier.name.lower()} {typed_size(tier.least_bytes, is_least=True)}"


def _dense_codec_flag(codec: str) -> str:
    return f"--dense-codec {codec}{' (costs quality)' if codec == LAST_RESORT else ''}"


def _smaller_dense_codecs(task: Task, outlook: Outlook) -> tuple[str, ...]:
    """Codecs that a user may set."""
    if task.settings.stored_dense_codec != LOSSLESS and task.is_store:
        return ()
    return DENSE_CODECS[DENSE_CODECS.index(outlook.placement.dense_codec) + 1 :]


def _largest_context(task: Task, context: int, memory: str) -> int:
    """The longest shorter context that fits, in steps; 0 if none does."""
    longest = (context - 1) // CONTEXT_STEP

    def fits(steps: int) -> bool:
        settings = replace(task.settings, context=steps * CONTEXT_STEP)
        return _has_room(replace(task, settings=settings), memory)

    low, high = 0, longest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * CONTEXT_STEP


def _has_room(task: Task, memory: str) -> bool:
    return not any(tier.missing_bytes for tier in look_ahead(task).placement.tiers if tier.name == memory)
