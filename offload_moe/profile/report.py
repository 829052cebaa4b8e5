"""All results from a trace in one structure, from which the terminal, the JSON document and the page are made."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from offload_moe.profile.balance import Balance, balance
from offload_moe.profile.behaviour import Coactivation, Overlap, Preference, coactivation, overlap, preferences
from offload_moe.profile.costs import Costs, costs
from offload_moe.profile.curves import Curves, Now, curves
from offload_moe.profile.guesses import Guesses, guesses
from offload_moe.profile.text import CLASSES, class_per_token
from offload_moe.profile.trace import Trace
from offload_moe.residency.policy import DEFAULT_POLICY
from offload_moe.system.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileReport:
    """None and empty lists stand for parts whose arrays the trace lacks.

    num_experts: of the largest layer. lookahead_recall: by depth, per layer. slot_bytes: of one expert.
    by_class, by_group: kinds of tokens and of text. guesses: of the generated tokens, by prompt lookup.
    """

    model: str
    num_tokens: int
    num_generated_tokens: int
    num_sequences: int
    num_layers: int
    num_experts: int
    top_k: int
    slot_bytes: int | None
    costs: Costs | None
    lookahead_recall: dict[str, list[float | None]]
    curves: Curves
    balance: Balance
    overlap: Overlap | None
    by_class: list[Preference]
    by_group: list[Preference]
    coactivation: Coactivation
    guesses: Guesses | None


def make_report(trace: Trace, *, progress: Progress) -> ProfileReport:
    """Compute every part of the report.

    progress: receives the phase and its finished share, 0 to 1.
    """
    metadata = json.loads(trace.metadata)
    spent = costs(trace)
    slot_bytes = metadata.get("slot_bytes")
    progress("Analysing the routing", 0.0)
    return ProfileReport(
        model=str(metadata.get("model", "")),
        num_tokens=trace.num_tokens,
        num_generated_tokens=0 if trace.is_prompt is None else int((~trace.is_prompt).sum()),
        num_sequences=len(trace.sequence_lengths),
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        slot_bytes=slot_bytes,
        costs=spent,
        lookahead_recall=metadata.get("lookahead_recall", {}),
        balance=balance(trace),
        overlap=overlap(trace),
        by_class=_by_class(trace, metadata),
        by_group=_by_group(trace, metadata),
        coactivation=coactivation(trace),
        guesses=guesses(trace),
        curves=curves(trace, now=_now(trace, metadata, spent), slot_bytes=slot_bytes, spent=spent, progress=progress),
    )


def report_to_json(report: ProfileReport) -> dict[str, Any]:
    """Ready for `json.dumps`."""
    return asdict(report)


def _now(trace: Trace, metadata: dict[str, Any], spent: Costs | None) -> Now | None:
    """The fastest tier of the recording."""
    slots = metadata.get("num_slots", {})
    if not trace.tiers or trace.tiers[0] not in slots:
        return None
    num_all = trace.keys.total
    num_slots = min(int(slots[trace.tiers[0]]), num_all)
    return Now(
        policy=str(metadata.get("policy", DEFAULT_POLICY)),
        num_slots=num_slots,
        share=num_slots / num_all,
        hit_rate=None if spent is None else spent.total.tiers[0].hit_rate,
    )


def _by_class(trace: Trace, metadata: dict[str, Any]) -> list[Preference]:
    classes = metadata.get("token_classes")
    if not classes or trace.token_ids is None:
        return []
    return preferences(trace, CLASSES, class_per_token(trace.token_ids, classes))


def _by_group(trace: Trace, metadata: dict[str, Any]) -> list[Preference]:
    groups = metadata.get("groups", [])
    kinds = list(dict.fromkeys(groups))
    if len(groups) != len(trace.sequence_lengths) or len(kinds) < 2:
        return []
    numbers = np.array([kinds.index(group) for group in groups])
    return preferences(trace, [kind or "no group" for kind in kinds], np.repeat(numbers, trace.sequence_lengths))
