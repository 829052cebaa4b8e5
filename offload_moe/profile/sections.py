"""The report as text and tables, for the terminal and the page."""

from offload_moe.profile.curves import MoreMemory, Now, curve_of, variant_name, variants
from offload_moe.profile.guess_section import guess_section
from offload_moe.profile.report import ProfileReport
from offload_moe.profile.routing_sections import load_section, routing_section
from offload_moe.profile.words import Section, Table, percent, plain

STALL_OF = {"ram": "waiting for the disk", "vram": "waiting for the link"}


def make_sections(report: ProfileReport) -> list[Section]:
    """The sections for which the trace has data."""
    found = [_time(report), _layers(report), _sizes(report), load_section(report), routing_section(report)]
    found.append(guess_section(report))
    return [section for section in found if section is not None]


def summary(report: ProfileReport) -> list[str]:
    generated = f"{report.num_generated_tokens:,} of them generated, " if report.num_generated_tokens else ""
    return [
        f"{report.num_tokens:,} tokens, {generated}in {report.num_sequences:,} sequences; {report.num_layers} MoE "
        f"layers, top-{report.top_k} of {report.num_experts} experts.",
        memory_sentence(report),
    ]


def memory_sentence(report: ProfileReport) -> str:
    """The effect of more memory, or the reason why it is unknown."""
    now, more = report.curves.now, report.curves.more_memory
    if now is None or more is None:
        return "The effect of more memory is unknown, because this trace does not have the number of slots."
    if now.share >= 1:
        return "Every expert has a slot, so more memory for experts has no effect."
    return _more_sentence(now, more)


def _more_sentence(now: Now, more: MoreMemory) -> str:
    points = 100 * (more.hit_rate - more.hit_rate_now)
    saved = "" if more.saved_s is None else f", about {1000 * more.saved_s:.2f} ms less per token"
    return (
        f"With {more.more_bytes / 2**30:g} GiB more: +{points:.1f} points{saved} (replayed, {now.policy}, "
        f"{now.num_slots:,} to {more.num_slots:,} slots, {percent(more.hit_rate_now)} to {percent(more.hit_rate)})."
    )


def time_parts(report: ProfileReport) -> list[tuple[str, float]]:
    """Names and milliseconds per token, in the order of a forward."""
    assert report.costs is not None
    time = report.costs.time
    stalls = [(STALL_OF.get(tier, f"waiting for {tier}"), seconds) for tier, seconds in time.stall_s.items()]
    parts = [("computing experts", time.experts_s), *stalls]
    parts += [("rest of the model", time.rest_s), ("between tokens", time.between_s)]
    return [(name, 1000 * seconds) for name, seconds in parts]


def _time(report: ProfileReport) -> Section | None:
    if report.costs is None:
        return None
    total = 1000 * report.costs.time.token_s
    rows = [[name, f"{value:.2f}", percent(value / total)] for name, value in time_parts(report)]
    what = "prompt" if report.costs.are_prompts else "generated"
    on_cpu = report.costs.share_on_cpu
    lines = [
        f"{total:.2f} ms per {what} token, the mean of {report.costs.num_tokens:,}, measured on the host's clock.",
        *([] if on_cpu is None else [f"{percent(on_cpu)} of the routed experts were computed by the CPU."]),
    ]
    if len(report.costs.total.tiers) > 1:
        lines.append("On a device compute is queued, so the host's time in the experts is not the device's.")
    return Section(
        key="time",
        title="Parts of a token's time",
        lines=lines,
        tables=[Table(title="Time per token", columns=["part", "ms", "share"], rows=rows)],
    )


def _layers(report: ProfileReport) -> Section | None:
    if report.costs is None:
        return None
    columns = ["layer"]
    several = len(report.costs.total.tiers) > 1
    for tier in report.costs.total.tiers:
        named = f"{tier.tier} " if several else ""
        names = ("hit", "delayed", "miss", "stall ms", "MiB", "prefetched", "useful")
        columns += [f"{named}{name}" for name in names]
    columns += ["compute ms", *(f"recall {depth}" for depth in report.lookahead_recall)]
    rows = [_layer_row(report, number) for number in range(report.num_layers)]
    lines = [
        "Per generated token. hit: resident at acquire; delayed: its prefetch was in flight; miss: neither.",
        _recall_line(report),
    ]
    title = "Every layer"
    return Section(
        key="layers",
        title="Hits, stalls and lookahead by layer",
        lines=lines,
        tables=[Table(title=title, columns=columns, rows=[*rows, _total_row(report)])],
    )


def _recall_line(report: ProfileReport) -> str:
    means = []
    for depth, values in report.lookahead_recall.items():
        known = [value for value in values if value is not None]
        if known:
            means.append(f"{percent(sum(known) / len(known))} {depth} ahead")
    if not means:
        return "Lookahead recall: unknown; this family's routers cannot be evaluated ahead, or the trace has no recall."
    return f"Lookahead recall, the share of routed experts predicted by an earlier layer: {', '.join(means)}."


def _layer_row(report: ProfileReport, number: int) -> list[str]:
    assert report.costs is not None
    recalls = [values[number] for values in report.lookahead_recall.values()]
    return [str(number), *_tier_cells(report, number), *(percent(recall) for recall in recalls)]


def _total_row(report: ProfileReport) -> list[str]:
    return ["all", *_tier_cells(report, -1), *("" for _ in report.lookahead_recall)]


def _tier_cells(report: ProfileReport, number: int) -> list[str]:
    """number: of the layer, -1 for all."""
    assert report.costs is not None
    costs = report.costs.total if number < 0 else report.costs.layers[number]
    cells = []
    for tier in costs.tiers:
        cells += [percent(tier.hit_rate), percent(tier.delayed_hit_rate), percent(tier.miss_rate)]
        cells += [f"{1000 * tier.stall_s:.3f}", f"{tier.loaded_bytes / 2**20:.2f}"]
        cells += [plain(tier.prefetch_issued), plain(tier.prefetch_useful)]
    return [*cells, f"{1000 * costs.compute_s:.3f}"]


def _sizes(report: ProfileReport) -> Section:
    shares = {point.num_slots: point.share for point in report.curves.points}
    sizes = sorted(shares)
    rows = []
    for policy, pool in variants(report.curves.points):
        rates = {point.num_slots: point.hit_rate for point in curve_of(report.curves.points, policy, pool)}
        if rates:
            rows.append([variant_name(policy, pool), *(percent(rates.get(size)) for size in sizes)])
    lines = [
        f"Replayed from a cold start, the first {report.curves.num_tokens:,} tokens one by one, without prefetch; one "
        "pool for all layers unless noted. belady uses the future and is an upper bound of all policies.",
    ]
    now = report.curves.now
    if now is not None and now.hit_rate is not None:
        lines.append(
            f"Recorded with {now.num_slots:,} slots ({percent(now.share)}): {percent(now.hit_rate)}, generated tokens "
            "only, with prefetch where it was on; that and a warm start are why it can lie above the replays."
        )
    columns = ["policy", *(f"{percent(shares[size])} ({size:,})" for size in sizes)]
    table = Table(title="Hit rate by slots", columns=columns, rows=rows, is_open=True)
    return Section(key="sizes", title="Hit rate against cache size", lines=lines, tables=[table])
