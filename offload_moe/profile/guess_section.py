"""What guessed tokens would give, as a section of the report."""

from offload_moe.profile.guesses import GuessedKind
from offload_moe.profile.report import ProfileReport
from offload_moe.profile.words import Section, Table, percent


def guess_section(report: ProfileReport) -> Section | None:
    guesses = report.guesses
    if guesses is None:
        return None
    lines = [
        f"{guesses.num_tokens:,} generated tokens would take {guesses.num_passes:,} passes with the guesses of prompt "
        f"lookup: {guesses.tokens_per_pass:.2f} tokens a pass, the most that the speed can gain. A recording itself "
        "makes no guesses.",
    ]
    table = Table(
        title="Guesses by how likely their first token seemed",
        columns=["probability", "passes", *(f"right {at}" for at in range(1, 1 + len(_first(guesses.kinds))))],
        is_open=True,  # nothing is drawn of it
        rows=[_row(kind) for kind in guesses.kinds],
    )
    return Section(key="guesses", title="Guessed tokens", lines=lines, tables=[table] if guesses.kinds else [])


def _row(kind: GuessedKind) -> list[str]:
    return [f"{percent(kind.least)} or more", f"{kind.num_passes:,}", *map(percent, kind.right)]


def _first(kinds: list[GuessedKind]) -> list[float]:
    return kinds[0].right if kinds else []
