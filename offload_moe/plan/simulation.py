"""A planned model on its described machine, run in virtual time."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from offload_moe.errors import BudgetError, ConfigError
from offload_moe.memory.disk import PART_BYTES, readers_for
from offload_moe.plan.parameters import ModelShape
from offload_moe.plan.plan import Plan
from offload_moe.plan.room import ContextRoom
from offload_moe.plan.speed import run_costs
from offload_moe.profile.trace import Trace
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import DEFAULT_POLICY
from offload_moe.simulate import (
    DiskModel,
    LinkModel,
    LookaheadModel,
    RunCosts,
    Simulation,
    VirtualPools,
    answers_of,
    simulate,
    simulation_to_json,
    synthetic_trace,
)
from offload_moe.simulate.run import SlotsFor
from offload_moe.simulate.synthetic import REUSE, SKEW
from offload_moe.system.sizes import format_size

PROMPT_TOKENS, DECODE_TOKENS = 128, 128  # of each synthetic answer
ASSUMED_RECALL = (0.75, 0.65)  # one and two MoE layers ahead, for traces without recall: see docs/simulate.md


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSimulation:
    """The simulation of a plan.

    workload: a description of the routing. recall: of the lookahead, by depth.
    """

    plan: Plan
    pools: VirtualPools
    costs: RunCosts
    recall: tuple[float, ...]
    workload: str
    result: Simulation


def simulate_plan(
    plan: Plan,
    trace: Trace | None = None,
    *,
    policy: str = DEFAULT_POLICY,
    prefetch: bool = True,
    prompt_tokens: int | None = None,
    num_tokens: int | None = None,
    skew: float | None = None,
    reuse: float | None = None,
) -> PlanSimulation:
    """Run a trace, or a synthetic one, on the machine of a plan. The first of several answers is warm-up.

    prompt_tokens: of each answer; None takes the trace's own, or 128. num_tokens: limit of all decoded tokens.

    Raises:
        BudgetError: the plan does not fit.
        ConfigError: the trace is of another shape, or an unknown policy.
    """
    if not plan.fits:
        lacking = ", ".join(f"{s.memory} lacks {format_size(s.missing_bytes)}" for s in plan.shortfalls)
        raise BudgetError(f"{plan.name} does not fit: {lacking}. `offload-moe plan` lists remedies.")
    shape = plan.shape
    if trace is None:
        prompt_tokens = PROMPT_TOKENS if prompt_tokens is None else prompt_tokens
        length = prompt_tokens + (num_tokens or DECODE_TOKENS)
        trace = _synthetic(shape, length, SKEW if skew is None else skew, REUSE if reuse is None else reuse)
        num_tokens = None
    keys = ExpertKeys(layer.num_experts for layer in shape.layers)
    _check_shape(trace, keys, _top_k(shape))
    answers = answers_of(trace, prompt_tokens=prompt_tokens, num_tokens=num_tokens)
    rates, placement = plan.machine.rates, plan.placement
    recall = _recall(trace) if prefetch else ()
    pools = VirtualPools(
        keys=keys,
        slot_bytes=placement.fast.slot_bytes,
        num_ram_slots=placement.ram.num_slots,
        num_device_slots=placement.vram.num_slots if placement.vram is not None else 0,
        policy=policy,
    )
    costs = run_costs(shape, plan.machine, plan.settings, placement)
    result = simulate(
        answers,
        pools,
        costs,
        DiskModel(
            bytes_per_s=rates.disk,
            latency_s=rates.disk_latency_s,
            num_readers=readers_for(pools.slot_bytes),
            part_bytes=PART_BYTES,
        ),
        LinkModel(bytes_per_s=rates.link, latency_s=rates.link_latency_s),
        LookaheadModel(recall=recall),
        num_warm_up=1 if len(answers) > 1 else 0,
        slots_for=borrowed_room(plan),
    )
    workload = str(json.loads(trace.metadata).get("model") or "a trace")
    return PlanSimulation(plan=plan, pools=pools, costs=costs, recall=recall, workload=workload, result=result)


def plan_simulation_to_json(simulation: PlanSimulation) -> dict[str, Any]:
    """Ready for `json.dumps`; docs/simulate.md describes the keys."""
    machine = simulation.plan.machine
    return {
        **simulation_to_json(simulation.result),
        "model": simulation.plan.name,
        "workload": simulation.workload,
        "machine": {"vram_bytes": machine.vram_bytes, "ram_bytes": machine.ram_bytes, "rates": asdict(machine.rates)},
        "pools": _pools_to_json(simulation.pools),
        "costs": asdict(simulation.costs),
        "lookahead_recall": list(simulation.recall),
    }


def _pools_to_json(pools: VirtualPools) -> dict[str, Any]:
    given = {field.name: getattr(pools, field.name) for field in fields(pools) if field.name != "keys"}
    return {"num_layers": pools.keys.num_layers, "num_experts": pools.keys.most, **given}


def _synthetic(shape: ModelShape, length: int, skew: float, reuse: float) -> Trace:
    return synthetic_trace(
        num_experts=[layer.num_experts for layer in shape.layers],
        top_k=_top_k(shape),
        num_tokens=length,
        num_sequences=2,
        skew=skew,
        reuse=reuse,
    )


def _top_k(shape: ModelShape) -> int:
    """What every layer can give."""
    return min(shape.top_k, *(layer.num_experts for layer in shape.layers))


def _check_shape(trace: Trace, keys: ExpertKeys, top_k: int) -> None:
    has = (trace.num_layers, trace.num_experts, trace.top_k)
    needs = (keys.num_layers, keys.most, top_k)
    if has != needs:
        raise ConfigError(
            "The trace has {} MoE layers, {} experts and top-{}, ".format(*has)
            + "the model {}, {} and top-{}. Record one of this model with `offload-moe profile`.".format(*needs)
        )
    if trace.keys.num_experts != keys.num_experts:
        raise ConfigError(
            f"The trace has layers of {[*trace.keys.num_experts]} experts, the model of {[*keys.num_experts]}. "
            "Record one of this model with `offload-moe profile`."
        )


def borrowed_room(plan: Plan) -> SlotsFor | None:
    """Slots borrow the room of a context that is not there yet, see `offload_moe.plan.room.may_borrow`."""
    attention = plan.shape.attention
    if plan.machine.has_device or not attention.keeps_all_tokens or attention.writes_scores:
        return None
    return ContextRoom(plan.shape, plan.machine.dtype, plan.placement, resize=int, borrows=True).slots_for


def _recall(trace: Trace) -> tuple[float, ...]:
    """The recorded recall, mean over the layers, of the two depths that the runtime uses."""
    recorded = json.loads(trace.metadata).get("lookahead_recall", {})
    found = []
    for depth, assumed in enumerate(ASSUMED_RECALL, start=1):
        values = [value for value in recorded.get(str(depth), []) if value is not None]
        found.append(sum(values) / len(values) if values else assumed)
    return tuple(found)
