"""The report's text and tables on load balance and routing behaviour."""

from collections.abc import Sequence

from offload_moe.profile.balance import CAPACITY_FACTORS, HOT, LayerBalance
from offload_moe.profile.behaviour import Preference
from offload_moe.profile.report import ProfileReport
from offload_moe.profile.words import Section, Table, mean, percent, plain


def load_section(report: ProfileReport) -> Section:
    layers = report.balance.layers
    losses = [layer.auxiliary_loss for layer in layers if layer.auxiliary_loss is not None]
    dropped = ", ".join(
        f"{percent(mean([layer.dropped[str(factor)] for layer in layers]))} at {factor:g}"
        for factor in CAPACITY_FACTORS
    )
    lines = [
        "f: an expert's share of the routed pairs of its layer; P: its mean router probability.",
        f"Auxiliary loss N * sum(f * P): {plain(mean(losses))} in the mean, 1 is even."
        if losses
        else "Auxiliary loss: unknown, because the trace has no router probabilities; some routers return none.",
        f"Entropy {percent(mean([layer.entropy_share for layer in layers]))} of the possible, coefficient of variation "
        f"{plain(mean([layer.variation for layer in layers]))}, busiest expert "
        f"{percent(max(layer.busiest_share for layer in layers))} of its layer at most.",
        f"Never used: {sum(layer.num_dead for layer in layers)} experts (even choices would leave "
        f"{plain(report.num_layers * report.balance.num_dead_by_chance)} in this many tokens); hot, above "
        f"{HOT:g} times the mean: {sum(layer.num_hot for layer in layers)}.",
        f"A capacity factor would drop, with all {report.balance.num_tokens:,} tokens as one batch: {dropped}.",
    ]
    columns = ["layer", "aux loss", "entropy bits", "share", "variation", "busiest", "its share", "busiest quarter"]
    columns += ["dead", "hot", *(f"drop at {factor:g}" for factor in CAPACITY_FACTORS)]
    table = Table(title="Every layer", columns=columns, rows=[_balance_row(layer) for layer in layers])
    return Section(key="load", title="Load of the experts", lines=lines, tables=[table])


def _balance_row(layer: LayerBalance) -> list[str]:
    return [
        str(layer.layer),
        plain(layer.auxiliary_loss),
        plain(layer.entropy_bits),
        percent(layer.entropy_share),
        plain(layer.variation),
        str(layer.busiest),
        percent(layer.busiest_share),
        percent(layer.busiest_quarter_share),
        str(layer.num_dead),
        str(layer.num_hot),
        *(percent(share) for share in layer.dropped.values()),
    ]


def routing_section(report: ProfileReport) -> Section:
    lines, tables = [], []
    if report.overlap is not None:
        lines.append(
            f"Of a token's experts, {percent(mean(report.overlap.adjacent))} were used by the token before it; two "
            f"tokens drawn at random share {percent(mean(report.overlap.by_chance))}."
        )
    kinds = (("class", report.by_class, "Kinds of tokens"), ("group", report.by_group, "Groups of prompts"))
    for column, preferences, title in kinds:
        if preferences:
            tables.append(_preferences(column, title, preferences))
    if tables:
        lines.append(
            "distance: the share of the load that differs between these tokens' experts and those of all tokens; by "
            "chance: the same with kinds assigned at random."
        )
    if report.coactivation.mean_lift:
        lines.append(
            f"Pairs of experts of neighbouring layers are routed together {plain(mean(report.coactivation.mean_lift))} "
            "times as often as independent layers would."
        )
        tables.append(_successions(report))
    return Section(key="routing", title="Dependences of routing", lines=lines, tables=tables)


def _preferences(column: str, title: str, preferences: Sequence[Preference]) -> Table:
    rows = [
        [
            kind.name,
            f"{kind.num_tokens:,}",
            percent(mean(kind.distance)),
            percent(kind.distance_by_chance),
            ", ".join(f"{best.layer}:{best.expert} ({best.lift:.1f}x)" for best in kind.favourites),
        ]
        for kind in preferences
    ]
    columns = [column, "tokens", "distance", "by chance", "prefers layer:expert (times its share of all)"]
    return Table(title=title, columns=columns, rows=rows, is_open=True)


def _successions(report: ProfileReport) -> Table:
    rows = [
        [
            f"{one.layer}:{one.expert}",
            f"{one.layer + 1}:{one.following}",
            f"{one.num_tokens:,}",
            percent(one.probability),
            f"{one.lift:.2f}",
        ]
        for one in report.coactivation.strongest
    ]
    columns = ["layer:expert", "is followed by", "tokens", "of its tokens", "lift"]
    return Table(title="Which expert follows which, by lift", columns=columns, rows=rows, is_open=True)
