"""The report's plots, per section."""

from collections.abc import Callable, Sequence

from offload_moe.profile.behaviour import Preference
from offload_moe.profile.belady import Belady
from offload_moe.profile.curves import curve_of, variant_name, variants
from offload_moe.profile.report import ProfileReport
from offload_moe.profile.sections import time_parts
from offload_moe.profile.svg import (
    Line,
    Mark,
    even_axis,
    heatmap,
    layer_axis,
    line_chart,
    percent_axis,
    stacked_bar,
)
from offload_moe.residency.policy import DEFAULT_POLICY, LRU

NUM_COLOURS = 7


def _time(report: ProfileReport) -> list[str]:
    parts = [(name, f"c{number % NUM_COLOURS}", value) for number, (name, value) in enumerate(time_parts(report))]
    return [stacked_bar("Time per token", parts, "ms")]


def _layers(report: ProfileReport) -> list[str]:
    assert report.costs is not None
    layers = range(report.num_layers)
    lines: list[Line] = []
    stalls: list[Line] = []
    several = len(report.costs.total.tiers) > 1
    for number, tier in enumerate(report.costs.total.tiers):
        costs = [layer.tiers[number] for layer in report.costs.layers]
        named = f"{tier.tier}: " if several else ""
        rates = (("hit", [c.hit_rate for c in costs]), ("miss", [c.miss_rate for c in costs]))
        for name, values in rates:
            style = f"c{len(lines) % NUM_COLOURS}"
            lines.append(Line(name=f"{named}{name}", style=style, x=layers, y=_percents(values)))
        stalls.append(Line(name=f"{named}stall", style=f"c{number}", x=layers, y=[1000 * c.stall_s for c in costs]))
    plots = [line_chart("Hits by layer", lines, layer_axis(report.num_layers), percent_axis("of routed experts"))]
    axis = even_axis("ms per token", [y for line in stalls for y in line.y if y is not None])
    plots.append(line_chart("Stall by layer", stalls, layer_axis(report.num_layers), axis))
    return plots + _recall(report)


def _recall(report: ProfileReport) -> list[str]:
    known = {depth: v for depth, v in report.lookahead_recall.items() if any(one is not None for one in v)}
    lines = [
        Line(name=f"{depth} ahead", style=f"c{number}", x=range(report.num_layers), y=_percents(values))
        for number, (depth, values) in enumerate(known.items())
    ]
    axis = percent_axis("of routed experts predicted")
    return [line_chart("Lookahead recall", lines, layer_axis(report.num_layers), axis)] if lines else []


def _sizes(report: ProfileReport) -> list[str]:
    lines = []
    styles = {
        (LRU.name, "layer"): "frame dashed",
        (Belady.name, "global"): "frame",
        (DEFAULT_POLICY, "global"): "strong c0",
    }
    for number, (policy, pool) in enumerate(variants(report.curves.points)):
        points = curve_of(report.curves.points, policy, pool)
        x, y = [100 * point.share for point in points], [100 * point.hit_rate for point in points]
        style = styles.get((policy, pool), f"c{1 + number % (NUM_COLOURS - 1)}")
        lines.append(Line(name=variant_name(policy, pool), style=style, x=x, y=y))
    now, marks = report.curves.now, []
    if now is not None:
        dot = None if now.hit_rate is None else 100 * now.hit_rate
        text = f"now: {now.num_slots:,} slots"
        marks.append(Mark(x=100 * now.share, text=text if dot is None else f"{text}, measured {dot:.1f}%", dot=dot))
    x_axis = percent_axis("experts that have a slot")
    return [line_chart("Hit rate against cache size", lines, x_axis, percent_axis("hit rate"), marks)]


def _load(report: ProfileReport) -> list[str]:
    rows = [[share * len(layer) for share in layer] for layer in report.balance.load]
    return [heatmap("Load of every expert, in units of its layer's mean", rows, "expert", "MoE layer")]


def _routing(report: ProfileReport) -> list[str]:
    plots, axis = [], layer_axis(report.num_layers)
    if report.overlap is not None:
        pair = (("adjacent tokens", report.overlap.adjacent), ("random pairs", report.overlap.by_chance))
        lines = [
            Line(name=name, style=f"c{6 * number}", x=range(report.num_layers), y=_percents(values))
            for number, (name, values) in enumerate(pair)
        ]
        plots.append(line_chart("Experts shared", lines, axis, percent_axis("of experts shared")))
    for title, kinds in (("Kinds of tokens", report.by_class), ("Groups of prompts", report.by_group)):
        if kinds:
            plots.append(_distances(title, kinds, report.num_layers))
    return plots


def _distances(title: str, kinds: Sequence[Preference], num_layers: int) -> str:
    lines = [
        Line(name=kind.name, style=f"c{number % NUM_COLOURS}", x=range(num_layers), y=_percents(kind.distance))
        for number, kind in enumerate(kinds)
    ]
    y_axis = even_axis("distance from all tokens", [y for line in lines for y in line.y if y is not None], unit="%")
    return line_chart(title, lines, layer_axis(num_layers), y_axis)


def _percents(shares: Sequence[float | None]) -> list[float | None]:
    return [None if share is None else 100 * share for share in shares]


PLOTS: dict[str, Callable[[ProfileReport], list[str]]] = {
    "time": _time,
    "layers": _layers,
    "sizes": _sizes,
    "load": _load,
    "routing": _routing,
}
