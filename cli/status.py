"""Statistics of an answer, in one line or in full."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from offload_moe.system.sizes import format_size

if TYPE_CHECKING:
    from offload_moe.chat import TurnStats
    from offload_moe.residency.counters import Counters
    from offload_moe.speculate.tally import Tally

ENDINGS = {
    "length": "stopped at {tokens:,} tokens, see /set max_new_tokens",
    "context": "the context is full, /reset starts a new conversation",
    "memory": "no memory for a longer context, /reset starts a new conversation",
    "interrupted": "stopped",
}
REUSES = {
    "recomputed": "the conversation was recomputed",
    "not supported": "this model computes the conversation anew each time",
}
CROSSED = (
    "the context passed {window:,} tokens: this model rotates keys differently beyond that, so the conversation was "
    "computed anew"
)


def status_line(stats: "TurnStats", width: int) -> str:
    """Rates, hit rate, stall and memory; wrapped between its parts on a narrow terminal."""
    prompt = f"prompt {stats.num_computed_tokens:,} tok"
    if stats.prompt_s:
        prompt += f" {stats.prompt_tokens_per_s:.1f}/s"
    if stats.num_reused_tokens:
        prompt += f" (+{stats.num_reused_tokens:,} cached)"
    parts = [prompt]
    if stats.time_to_first_token_s:
        parts.append(f"first token {stats.time_to_first_token_s:.1f} s")
    answer = f"answer {stats.num_decode_tokens:,} tok"
    parts.append(f"{answer} {stats.decode_tokens_per_s:.1f}/s" if stats.decode_s else answer)
    if stats.guesses is not None and stats.guesses.num_passes:
        guesses = stats.guesses
        right = f"{guesses.num_right:,} of {guesses.num_guessed:,} guesses right"
        parts.append(f"{right}, {guesses.gain(stats.decode_s):.2f} times as fast")
    if stats.hit_rate is not None:
        parts += [f"hits {stats.hit_rate:.1%}", f"stall {stats.stall_s:.1f} s"]
    if stats.memory_bytes:
        parts.append(format_size(sum(stats.memory_bytes.values())))
    if stats.num_slots_given_up:
        parts.append(f"{stats.num_slots_given_up:,} expert slots were freed for the context")
    if stats.num_slots_lost:
        parts.append(f"{stats.num_slots_lost:,} expert slots made room for other programs")
    if stats.crossed_window is not None:
        parts.append(CROSSED.format(window=stats.crossed_window))
    elif stats.reuse in REUSES and stats.num_prompt_tokens:
        parts.append(REUSES[stats.reuse])
    parts += [ENDINGS[stats.finish].format(tokens=stats.num_decode_tokens)] if stats.finish in ENDINGS else []
    return _wrap(parts, width)


def full_statistics(stats: "TurnStats | None", memory_bytes: Mapping[str, int]) -> list[tuple[str, str]]:
    """Names and values of the last answer and of the memory in use."""
    rows: list[tuple[str, str]] = []
    if stats is not None:
        rows += [
            (
                "prompt",
                f"{stats.num_prompt_tokens:,} tokens, {stats.num_reused_tokens:,} from the cache ({stats.reuse})",
            ),
            ("prompt time", f"{stats.prompt_s:.2f} s, {stats.prompt_tokens_per_s:.1f} tokens/s"),
            ("time to first token", f"{stats.time_to_first_token_s:.2f} s"),
            ("answer", f"{stats.num_decode_tokens:,} tokens ({stats.finish})"),
            ("answer time", f"{stats.decode_s:.2f} s, {stats.decode_tokens_per_s:.1f} tokens/s"),
        ]
    if stats is not None and stats.guesses is not None:
        rows += _guess_rows(stats.guesses, stats.decode_s)
    if stats is not None and stats.counters is not None:
        counters = stats.counters
        rows += [
            ("tokens per pass", f"{counters.rows_per_pass:.2f} computed, {counters.num_passes:,} passes"),
            ("expert hits", f"{counters.num_hits:,} of {counters.num_accesses:,} ({counters.hit_rate:.1%})"),
            ("delayed hits", f"{counters.num_delayed_hits:,}"),
            ("misses", f"{counters.num_misses:,}, {counters.num_evictions:,} evictions"),
            *_hybrid_rows(counters),
            *_card_rows(counters),
            *_choice_rows(counters),
            ("stall", f"{counters.stall_s:.2f} s"),
            ("read from disk", format_size(counters.disk_bytes)),
            ("sent to the device", format_size(counters.h2d_bytes)),
        ]
    return rows + [(f"memory: {name}", format_size(num_bytes)) for name, num_bytes in memory_bytes.items()]


def peak_rows(peaks: Mapping[str, tuple[int, int]]) -> list[tuple[str, str]]:
    """The planned peak and the actual peak of each memory."""
    return [
        (f"{memory} at its peak", f"{format_size(peak)}, planned {format_size(planned)} with the context full")
        for memory, (planned, peak) in peaks.items()
    ]


def _guess_rows(guesses: "Tally", decode_s: float) -> list[tuple[str, str]]:
    """Guessed tokens that were computed, and what that gave."""
    if not guesses.num_passes:
        return [("guessed tokens", "none")]
    shares = " ".join(f"{share:.0%}" for share in guesses.acceptance)
    return [
        ("guessed tokens", f"{guesses.num_right:,} of {guesses.num_guessed:,} right; first to last of a pass {shares}"),
        ("with guesses", f"{guesses.gain(decode_s):.2f} times as fast, {guesses.num_misses:+,.0f} misses"),
    ]


def _hybrid_rows(counters: "Counters") -> list[tuple[str, str]]:
    """The misses that the CPU computed, and the predicted times beside the measured ones."""
    if not counters.num_computed_on_cpu:
        return []
    rows = [("computed on the CPU", f"{counters.num_computed_on_cpu:,} of the misses")]
    if not counters.cpu_predicted_s:  # of the card's stepwise passes, which predict nothing
        return [*rows, ("CPU's share", f"{counters.cpu_s:.2f} s")]
    return [
        *rows,
        ("CPU's share", f"{counters.cpu_s:.2f} s, {counters.cpu_predicted_s:.2f} s predicted"),
        ("link's share", f"{counters.link_s:.2f} s, {counters.link_predicted_s:.2f} s predicted"),
    ]


def _card_rows(counters: "Counters") -> list[tuple[str, str]]:
    """Passes of the card, by where missing experts were computed."""
    ways = (
        ("queued", counters.num_queued, counters.queued_s),
        ("stepwise", counters.num_stepwise, counters.stepwise_s),
    )
    return [
        (f"{name} passes", f"{number:,}, {1e3 * seconds / number:.1f} ms each")
        for name, number, seconds in ways
        if number
    ]


def _choice_rows(counters: "Counters") -> list[tuple[str, str]]:
    """Where next tokens were chosen, where the card has the output head, and what choosing elsewhere took."""
    on_card, from_logits = counters.num_chosen_on_card, counters.num_chosen_from_logits
    if not on_card + from_logits:
        return []
    each_ms = 1e3 * counters.choice_s / from_logits if from_logits else 0.0
    return [
        ("chosen on the card", f"{on_card:,} tokens"),
        ("chosen from its logits", f"{from_logits:,} tokens, {each_ms:.2f} ms each"),
    ]


def _wrap(parts: list[str], width: int) -> str:
    lines = [parts[0]]
    for part in parts[1:]:
        joined = f"{lines[-1]} · {part}"
        if len(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(part)
    return "\n".join(lines)
