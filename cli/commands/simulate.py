"""`offload-moe simulate`: the speed of a model on a described machine."""

import argparse
import json
from typing import TYPE_CHECKING

from offload_moe.errors import ConfigError
from offload_moe.system.names import check_model
from offload_moe.system.sizes import format_size, parse_size, parse_tokens

from ..options import CODEC_HELP, DENSE_CODECS, Subparsers, add_codec, add_device_pass, policy_name
from ..progress import reporter
from ..terminal import console

if TYPE_CHECKING:
    from offload_moe.plan import Machine
    from offload_moe.plan.simulation import PlanSimulation

DEFAULT_RAM = "32GiB"


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "simulate",
        help="predict the speed of a model on another machine",
        description="Predict prompt and decode tokens/s on a described machine: the runtime's own scheduler, in "
        "virtual time, on a recorded routing trace or a synthetic one. Every figure is simulated.",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="hub id, checkpoint folder, store, demo, or a config.json"
    )
    group = parser.add_argument_group("machine")
    group.add_argument("--gpu", metavar="NAME", help="a card of the table, such as rtx-4090 (default: no GPU)")
    group.add_argument("--cards", action="store_true", help="show the table of cards and exit")
    group.add_argument(
        "--vram", type=parse_size, metavar="SIZE", help="GPU memory to use (default: 90%% of the card's)"
    )
    group.add_argument("--ram", type=parse_size, metavar="SIZE", help=f"RAM to use (default: {DEFAULT_RAM})")
    group.add_argument("--ram-gbps", metavar="GB/S", help="RAM bandwidth that kernels reach (default: 40)")
    group.add_argument(
        "--pcie", metavar="LINK", help="such as 4x16, or the GB/s that copies reach (default: the card's)"
    )
    group.add_argument("--disk-gbps", metavar="GB/S", help="random reads of whole experts (default: 1)")
    group = parser.add_argument_group("routing")
    group.add_argument("--trace", metavar="FILE", help="from `offload-moe profile --trace` (default: a synthetic one)")
    group.add_argument("--skew", type=float, metavar="S", help="synthetic: how uneven the load is, 0 is even")
    group.add_argument("--reuse", type=float, metavar="P", help="synthetic: share of experts kept from token to token")
    group.add_argument("--prompt-tokens", type=int, metavar="N", help="tokens of each prompt")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens that are decoded")
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--context", type=parse_tokens, metavar="TOKENS", help="tokens of the conversation (default: 8192)"
    )
    group.add_argument("--policy", type=policy_name, metavar="NAME", help="which experts to keep, such as lru")
    group.add_argument("--no-prefetch", action="store_true", help="without lookahead")
    add_codec(group, f"{CODEC_HELP}; a store has its own")
    group.add_argument("--dense-codec", choices=DENSE_CODECS, help="format of the other weights")
    add_device_pass(group)
    group.add_argument("--revision", metavar="REF", help="branch, tag or commit of a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    if options.cards:
        _print_cards()
        return 0
    if options.model is None:
        options.usage_error("give a MODEL, or --cards to see the table")
    if options.trace and (options.skew is not None or options.reuse is not None):
        options.usage_error("--skew and --reuse make a synthetic trace; leave them out with --trace")
    _check(options)
    check_model(options.model, options.revision)
    with reporter() as report:
        report("Loading libraries")
        from offload_moe.convert.sources import find_source
        from offload_moe.plan import make_plan
        from offload_moe.plan.simulation import plan_simulation_to_json, simulate_plan
        from offload_moe.profile.trace import load_trace
        from offload_moe.residency.policy import DEFAULT_POLICY

        trace = load_trace(options.trace) if options.trace else None
        report(f"Planning {options.model}")
        plan = make_plan(
            find_source(options.model),
            _machine(options),
            context=options.context,
            codec=options.codec,
            dense_codec=options.dense_codec,
            revision=options.revision,
            device_pass=options.device_pass != "off",
        )
        report("Simulating")
        simulation = simulate_plan(
            plan,
            trace,
            policy=options.policy or DEFAULT_POLICY,
            prefetch=not options.no_prefetch,
            prompt_tokens=options.prompt_tokens,
            num_tokens=options.max_new_tokens,
            skew=options.skew,
            reuse=options.reuse,
        )
    if options.json:
        print(json.dumps(plan_simulation_to_json(simulation), indent=2))
    else:
        _print(simulation)
    return 0


def _check(options: argparse.Namespace) -> None:
    for flag, value, least, most in (
        ("--skew", options.skew, 0, 10),
        ("--reuse", options.reuse, 0, 1),
        ("--prompt-tokens", options.prompt_tokens, 0, 10**6),
        ("--max-new-tokens", options.max_new_tokens, 1, 10**6),
    ):
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{flag} {value} is not usable. It must lie between {least} and {most}.")
    if options.gpu is None and (options.pcie is not None or options.vram):
        raise ConfigError("--vram and --pcie describe a GPU: name the card with --gpu, such as --gpu rtx-4090.")


def _machine(options: argparse.Namespace) -> "Machine":
    from dataclasses import replace

    from offload_moe.plan import Machine, Rates, with_card
    from offload_moe.simulate import hardware

    rates = Rates()
    if options.ram_gbps is not None:
        rates = replace(rates, ram=hardware.gigabytes_per_s("--ram-gbps", options.ram_gbps))
    if options.disk_gbps is not None:
        rates = replace(rates, disk=hardware.gigabytes_per_s("--disk-gbps", options.disk_gbps))
    ram_bytes = parse_size(DEFAULT_RAM) if options.ram is None else options.ram
    machine = Machine(ram_bytes=ram_bytes, rates=rates)
    return machine if options.gpu is None else with_card(machine, options.gpu, vram=options.vram, link=options.pcie)


def _print(simulation: "PlanSimulation") -> None:
    from rich import box
    from rich.table import Table

    result, machine, pools = simulation.result, simulation.plan.machine, simulation.pools
    out = console()
    out.print(f"{simulation.plan.name} on a described machine. Every figure is simulated.", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("simulated")
    table.add_column("", justify="right")
    fast = "VRAM" if machine.has_device else "RAM"
    num_all = pools.keys.total
    num_fast = min(pools.num_device_slots or pools.num_ram_slots, num_all)
    rows = [
        ("decode", f"{result.decode_tokens_per_s:.1f} tokens/s"),
        ("prompt", f"{result.prompt_tokens_per_s:.1f} tokens/s"),
        ("first token after", f"{result.first_token_s:.2f} s"),
        ("a token takes", f"{1e3 * result.token_s:.1f} ms, 95% under {1e3 * result.slow_token_s:.1f} ms"),
        ("of it waiting for experts", f"{1e3 * result.stall_s:.1f} ms"),
        (f"experts with a slot in {fast}", f"{num_fast / num_all:.0%}"),
        (f"found in {fast}", f"{result.hit_rate:.1%}, {result.delayed_hit_rate:.1%} on their way"),
        ("from disk per token", format_size(result.disk_bytes)),
    ]
    if machine.has_device:
        rows.append(("over the link per token", format_size(result.h2d_bytes)))
    if result.stepwise_rate is not None:
        rows.append(("computed by the CPU per token", f"{result.num_computed_on_cpu:.1f} experts"))
        rows.append(("passes that go stepwise", f"{result.stepwise_rate:.0%}"))
    for row in rows:
        table.add_row(*row)
    out.print(table)
    rates, python_s = machine.rates, simulation.costs.layer_host_s
    assumed = [f"{fast} {(rates.vram if machine.has_device else rates.ram) / 1e9:.0f}", f"disk {rates.disk / 1e9:.1f}"]
    if machine.has_device:
        assumed.insert(1, f"link {rates.link / 1e9:.0f}")
    recall = ", ".join(f"{value:.0%}" for value in simulation.recall) or "no prefetch"
    out.print(f"Routing: {simulation.workload}; lookahead recall {recall}; policy {pools.policy}.", soft_wrap=True)
    out.print(f"GB/s assumed: {', '.join(assumed)}. {python_s * 1e3:.2g} ms of Python per layer.", soft_wrap=True)
    if simulation.costs.device_pass is not None:
        out.print(f"Decode takes the device pass. {machine.describe_pass()}", soft_wrap=True)


def _print_cards() -> None:
    from rich import box
    from rich.table import Table

    from offload_moe.simulate.hardware import CARDS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("card", "left"), ("VRAM GiB", "right"), ("GB/s", "right"), ("TFLOPS", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    table.add_column("PCIe")
    table.add_column("published in")
    for card in CARDS.values():
        table.add_row(
            card.name, str(card.vram_gib), f"{card.memory_gbps:.0f}", f"{card.tflops:.0f}", card.link, card.source
        )
    console().print(table)
