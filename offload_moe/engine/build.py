"""From a store to an engine: dense weights in place, tiers made, every MoE layer bound to them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from offload_moe.checkpoint.experts import ExpertsModule
from offload_moe.engine.assemble import Assembled, assemble
from offload_moe.engine.mtp import assemble_mtp
from offload_moe.engine.saving import refuse_saving
from offload_moe.experts.arithmetic import Arithmetic, choose_arithmetic, keeps_eagers_bits, notice_without_kernel
from offload_moe.experts.attach import BoundExperts, attach
from offload_moe.experts.hybrid import Hybrid, HybridBinder
from offload_moe.experts.lookahead import Lookahead
from offload_moe.experts.per_expert import ReferenceArithmetic
from offload_moe.experts.probe import find_probes
from offload_moe.families.text_model import MtpModel, TextModel
from offload_moe.memory.arena import Arena
from offload_moe.memory.copier import Copier
from offload_moe.memory.disk import DiskMover
from offload_moe.native.kernels import Repacking, SlotTable
from offload_moe.residency.hierarchy import Hierarchy, Pools
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import DEFAULT_POLICY
from offload_moe.residency.prefetch import PrefetchGovernor
from offload_moe.store import Record, Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """What to build from a store.

    device, dtype: of dense weights and compute. dense_codec: see `assemble`. make_copier: None without a device tier.
    experts_device: the device whose arithmetic computes the experts; None takes `device`. prefetch: MoE layers ahead.
    in_panels: records on the device have the order of the device pass.
    """

    pools: Pools
    device: torch.device
    dtype: torch.dtype
    make_copier: Callable[[], Copier] | None = None
    experts_device: torch.device | None = None
    dense_codec: str | None = None
    is_exact: bool = False
    prefetch: int = 0
    hybrid: Hybrid = "off"
    in_panels: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A model that computes, and the tiers of its experts, which are public for measurements.

    layers, experts: one for each MoE layer, in order. notices: messages for the user. mtp: the layer for multi-token
    prediction, where it was asked for.
    """

    hf: TextModel
    layers: list[ExpertsModule]
    experts: list[BoundExperts]
    hierarchy: Hierarchy
    notices: tuple[str, ...] = ()
    mtp: MtpModel | None = None

    @property
    def lookahead(self) -> Lookahead | None:
        """None where nothing is prefetched."""
        return self.experts[0].lookahead


def pools_of(
    store: Store,
    *,
    slot_bytes: int,
    num_ram_slots: int,
    num_device_slots: int = 0,
    policy: str = DEFAULT_POLICY,
    has_mtp: bool = False,
) -> Pools:
    """Slots for the experts of a store. slot_bytes: of the largest record; a policy is one of `policy_names()`.

    has_mtp: also for those for multi-token prediction.
    """
    layers = store.manifest.layers if has_mtp else store.layers
    return Pools(
        keys=ExpertKeys(layer.num_experts for layer in layers),
        slot_bytes=slot_bytes,
        num_ram_slots=num_ram_slots,
        num_device_slots=num_device_slots,
        policy=policy,
    )


def build(store: Store, blueprint: Blueprint, skeleton: TextModel | None = None, mtp: MtpModel | None = None) -> Engine:
    """The store's model, ready to compute. skeleton: see `assemble`.

    mtp: the layer for multi-token prediction without weights, on the CPU; the pools are for its experts, too.

    Raises:
        StoreError: the store does not hold what the model needs.
        ConfigError: `hybrid` is "on", and no native kernel computes these experts.
    """
    assembled = assemble(
        store,
        blueprint.device,
        blueprint.dtype,
        dense_codec=blueprint.dense_codec,
        is_exact=blueprint.is_exact,
        in_panels=blueprint.in_panels,
        skeleton=skeleton,
    )
    layers = assembled.layers
    if mtp is not None:
        of_mtp = assemble_mtp(store, mtp, assembled.hf, blueprint.dtype, blueprint.dense_codec)
        layers = [*layers, *of_mtp.layers]
    arithmetics = _arithmetics(layers, store, blueprint)
    with closed_on_error(_make_hierarchy(store, blueprint, arithmetics)) as hierarchy:
        _refuse_once_closed(assembled.hf, hierarchy)
        refuse_saving(assembled.hf)
        experts = _bind_experts(assembled, layers, arithmetics, store, hierarchy, blueprint)
        attach(layers, experts)
    return Engine(
        hf=assembled.hf,
        layers=assembled.layers,
        experts=experts[: len(assembled.layers)],
        hierarchy=hierarchy,
        notices=(*assembled.notices, *_notices(layers, arithmetics, store, blueprint)),
        mtp=mtp,
    )


def _arithmetics(layers: list[ExpertsModule], store: Store, blueprint: Blueprint) -> list[Arithmetic]:
    """The arithmetic of each MoE layer."""
    device = blueprint.experts_device or blueprint.device
    return [
        choose_arithmetic(
            layer.contract,
            layer.shape,
            store.codec_of(index),
            device,
            dtype=blueprint.dtype,
            is_exact=blueprint.is_exact,
            in_panels=blueprint.in_panels,
        )
        for index, layer in enumerate(layers)
    ]


def _notices(
    layers: list[ExpertsModule], arithmetics: Sequence[Arithmetic], store: Store, blueprint: Blueprint
) -> list[str]:
    """Messages about the experts for the user."""
    device = blueprint.experts_device or blueprint.device
    if keeps_eagers_bits(store.codec, device, blueprint.dtype, is_exact=blueprint.is_exact):
        return []
    return [
        notice_without_kernel(layer.contract, layer.shape, store.codec_of(index))
        for index, (layer, arithmetic) in enumerate(zip(layers, arithmetics, strict=True))
        if isinstance(arithmetic, ReferenceArithmetic)
    ]


def _make_hierarchy(store: Store, blueprint: Blueprint, arithmetics: Sequence[Arithmetic]) -> Hierarchy:
    copier = blueprint.make_copier() if blueprint.make_copier is not None else None
    keys = blueprint.pools.keys

    def record_of(key: int) -> Record:
        return store.record(*keys.layer_expert(key))

    def repacking_of(key: int) -> Repacking | None:
        return Repacking.between(record_of(key).panels, arithmetics[keys.layer_expert(key)[0]].order)

    def make_mover(arena: Arena, slot_table: SlotTable) -> DiskMover:
        return DiskMover(arena, slot_table, record_of, repacking_of)

    return Hierarchy(blueprint.pools, make_mover, copier)


@contextmanager
def closed_on_error(hierarchy: Hierarchy) -> Iterator[Hierarchy]:
    """Free memory, threads and files when the body fails."""
    try:
        yield hierarchy
    except BaseException:
        hierarchy.close()
        raise


def _refuse_once_closed(hf: TextModel, hierarchy: Hierarchy) -> None:
    """Make every forward fail once the model is closed, before it computes anything. The experts check it, too."""
    encoder = [hf.get_encoder()] if hf.config.is_encoder_decoder else []
    for module in (*encoder, hf.get_decoder()):
        module.register_forward_pre_hook(lambda *_: hierarchy.lifecycle.begin_forward())


def _bind_experts(
    assembled: Assembled,
    layers: list[ExpertsModule],
    arithmetics: Sequence[Arithmetic],
    store: Store,
    hierarchy: Hierarchy,
    blueprint: Blueprint,
) -> list[BoundExperts]:
    """The experts of each MoE layer. Lookahead is for those of the model itself."""
    lookahead = None
    if blueprint.prefetch and not hierarchy.holds_every_expert:
        probes = find_probes(assembled.hf, assembled.layers)
        lookahead = Lookahead(probes, hierarchy.scheduler, PrefetchGovernor(), blueprint.prefetch, hierarchy.ram)
    bind = HybridBinder(hierarchy, blueprint.hybrid, lookahead) if hierarchy.num_slots("vram") else None
    bound = []
    for ordinal, (layer, arithmetic) in enumerate(zip(layers, arithmetics, strict=True)):
        split = bind(ordinal, layer, store.codec_of(ordinal), arithmetic) if bind is not None else None
        ahead = lookahead if ordinal < len(assembled.layers) else None
        bound.append(
            split
            or BoundExperts(ordinal, layer.num_experts, hierarchy.scheduler, hierarchy.record_of, arithmetic, ahead)
        )
    return bound
