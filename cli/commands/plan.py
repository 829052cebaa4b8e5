"""`offload-moe plan`: memory, placement and speed of a model, before a download."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from offload_moe.system.names import check_model
from offload_moe.system.sizes import format_size, parse_size, parse_tokens

from ..options import CODEC_HELP, DENSE_CODECS, MEMORY, Subparsers, add_codec, add_device_pass, fill
from ..progress import reporter
from ..terminal import console

if TYPE_CHECKING:
    from rich.table import Table

    from offload_moe.plan import Machine, Plan
    from offload_moe.plan.mtp import MtpCost
    from offload_moe.plan.placement import Tier

EXIT_FITS, EXIT_DOES_NOT_FIT = 0, 1
# Bottlenecks in words that do not assume knowledge of the code.
BOTTLENECKS = {
    "disk": "reading missed experts from disk",
    "link": "sending missed experts to the GPU",
    "CPU": "computing missed experts on the CPU",
    "dense weights": "reading dense weights and the cache",
    "expert compute": "reading experts where they are computed",
    "layer overhead": "fixed costs of each layer",
}


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="show the memory and speed of a model before a download",
        description="Show the memory that a model needs, its placement and its speed, from its config alone. "
        "Exits with 0 if it fits and with 1 if it does not.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="hub id, checkpoint folder, GGUF file, store, demo, or a config.json"
    )
    group = parser.add_argument_group("machine")
    group.add_argument("--gpu", metavar="NAME", help="a card from `simulate --cards`, such as rtx-4090")
    group.add_argument(
        "--vram",
        type=parse_size,
        metavar="SIZE",
        help="GPU memory, such as 12GiB, or 0 (default: the free memory of this machine)",
    )
    group.add_argument(
        "--ram", type=parse_size, metavar="SIZE", help="RAM, such as 64GiB (default: the free memory of this machine)"
    )
    parser.add_argument(
        "--context",
        type=parse_tokens,
        metavar="TOKENS",
        help="tokens of the conversation (default: as many as fit, at most 8192)",
    )
    add_codec(parser, f"{CODEC_HELP}; a store has its own")
    parser.add_argument(
        "--dense-codec", choices=DENSE_CODECS, help="format of the other weights (default: the most exact that fits)"
    )
    add_device_pass(parser)
    parser.add_argument("--revision", metavar="REF", help="branch, tag or commit of a hub id")
    parser.add_argument("--draft", metavar="MODEL", help="a draft model that is loaded beside it, see `run --draft`")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    check_model(options.model, options.revision)
    fill(options, *(name for name in MEMORY if name != "vram" or options.gpu is None))
    with reporter() as report:
        report("Loading libraries")
        from offload_moe.convert.sources import find_source
        from offload_moe.engine.draft import draft_to_plan
        from offload_moe.plan import make_plan, plan_to_json

        report(f"Planning {options.model}")
        plan = make_plan(
            find_source(options.model),
            _machine(options),
            context=options.context,
            codec=options.codec,
            dense_codec=options.dense_codec,
            revision=options.revision,
            draft_bytes=None if options.draft is None else draft_to_plan(options.draft).num_bytes,
            device_pass=options.device_pass != "off",
            names_card=options.gpu is not None or bool(options.vram),
        )
    if notice := _notice_of_another_machine(options):
        print(notice, file=sys.stderr)
    if options.json:
        print(json.dumps(plan_to_json(plan), indent=2))
    else:
        _print(plan)
    return EXIT_FITS if plan.fits else EXIT_DOES_NOT_FIT


def _machine(options: argparse.Namespace) -> "Machine":
    from offload_moe.plan import measure_machine, with_card

    if options.gpu is None:
        return measure_machine(vram=options.vram, ram=options.ram)
    return with_card(measure_machine(vram=0, ram=options.ram), options.gpu, vram=options.vram)


def _notice_of_another_machine(options: argparse.Namespace) -> str:
    from offload_moe.memory.copier import compute_device
    from offload_moe.plan.budget import total_ram

    named = []
    if options.gpu is None and options.vram and compute_device().type == "cpu":
        named.append(f"{format_size(options.vram)} of GPU memory, and this machine has no GPU")
    if options.ram is not None and options.ram > total_ram():
        named.append(f"{format_size(options.ram)} of RAM, and this machine has {format_size(total_ram())}")
    return f"Planned for another machine: {'; '.join(named)}." if named else ""


def _print(plan: "Plan") -> None:
    from offload_moe.plan.advice import explain

    out = console()
    for line in _summary(plan):
        out.print(line, soft_wrap=True)
    out.print(_memory_table(plan))
    if plan.placement.warning:
        out.print(f"Warning: {plan.placement.warning}.", soft_wrap=True)
    if plan.mtp is not None:
        out.print(_mtp_line(plan.mtp), soft_wrap=True)
    for line in _speed_lines(plan) if plan.fits else map(explain, plan.shortfalls):
        out.print(line, soft_wrap=True)


def _summary(plan: "Plan") -> list[str]:
    from offload_moe.plan.sizes import fp16_bytes

    shape = plan.shape
    about = "" if plan.checkpoint_is_exact else "about "
    stores = ", ".join(f"{codec} {format_size(size)}" for codec, size in plan.store_bytes.items())
    return [
        f"{plan.name}: {shape.architecture}, {_billions(shape.total_parameters)} parameters, "
        f"{_billions(shape.active_parameters)} active",
        f"{len(shape.layers)} MoE layers, {shape.num_experts:,} experts, top-{shape.top_k}",
        f"In fp16 {format_size(fp16_bytes(shape.total_parameters))}, "
        f"active {format_size(fp16_bytes(shape.active_parameters))}",
        f"Checkpoint {about}{format_size(plan.checkpoint_bytes)}; store by codec of the experts: {stores}",
    ]


def _mtp_line(cost: "MtpCost") -> str:
    return (
        f"Beside that, for multi-token prediction: {format_size(cost.store_bytes)} in the store, and where it guesses "
        f"tokens on the CPU {format_size(cost.memory_bytes)} of RAM; its {cost.num_experts:,} experts share the slots."
    )


def _memory_table(plan: "Plan") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("memory", "what"):
        table.add_column(name)
    table.add_column("size", justify="right")
    for tier in plan.placement.tiers:
        for index, part in enumerate(part for part in tier.fixed if part.num_bytes):
            what = f"{part.name}, {part.detail}" if part.detail else part.name
            table.add_row(_tier_name(tier) if index == 0 else "", what, format_size(part.num_bytes))
        if tier.slot_bytes:
            slots = f"{tier.num_slots:,} expert slots of {format_size(tier.slot_bytes)}"
            slots += f", {tier.num_slots / len(plan.shape.layers):.1f} per layer"
            table.add_row("", slots, format_size(tier.num_slots * tier.slot_bytes))
        if tier.fixed:
            table.add_row("", "total", format_size(tier.used_bytes), end_section=True)
    return table


def _tier_name(tier: "Tier") -> str:
    return tier.name if tier.budget_bytes is None else f"{tier.name} {format_size(tier.budget_bytes)}"


def _speed_lines(plan: "Plan") -> list[str]:
    from offload_moe.plan.speed import BASIS

    assert plan.speed is not None
    low, high = plan.speed.forecasts[0], plan.speed.forecasts[-1]
    rates, fast = plan.machine.rates, plan.placement.fast.name
    assumed = {"VRAM": rates.vram, "link": rates.link} if plan.machine.has_device else {"RAM": rates.ram}
    bandwidths = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in {**assumed, "disk": rates.disk}.items())
    lines = [
        f"Decode {_span(low.tokens_per_s, high.tokens_per_s, '.1f')} tokens/s ({BASIS}).",
        f"Experts found in {fast}: {_span(low.hit_rate, high.hit_rate, '.0%')}; "
        f"read from disk: {_span(high.disk_rate, low.disk_rate, '.0%')}.",
        f"Hit rates as in {' and '.join(f.trace for f in (low, high))}; GB/s assumed, not measured: {bandwidths}.",
        *_way_lines(plan),
        f"A run differs where the machine does (`offload-moe doctor` measures it), and is faster while the "
        f"conversation is shorter than {plan.placement.context:,} tokens.",
        f"What binds: {BOTTLENECKS[plan.speed.bottleneck]}.",
    ]
    if plan.changes:
        best = plan.changes[0]
        lines.append(
            f"What would help most: {best.name}, from {plan.speed.tokens_per_s:.1f} to "
            f"{best.tokens_per_s:.1f} tokens/s on average."
        )
    return lines


def _way_lines(plan: "Plan") -> list[str]:
    """How tokens are decoded on a card, and what is assumed of it."""
    assert plan.speed is not None
    if not plan.machine.has_device:
        return []
    if plan.why_no_device_pass:
        return [f"Decode goes through transformers' modules, without the device pass: {plan.why_no_device_pass}."]
    ways = " or ".join(dict.fromkeys(forecast.way for forecast in plan.speed.forecasts))
    return [f"Decode takes the device pass, {ways}; it has never run on a card. {plan.machine.describe_pass()}"]


def _span(one: float, other: float, form: str) -> str:
    first, last = (format(value, form) for value in sorted((one, other)))
    return first if first == last else f"{first} to {last}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}B"
