"""One line of the doctor's report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """found: the finding as text. fix: the remedy; empty if the verdict is ok.

    numbers: measurements by name: `*_bytes`, `*_bytes_per_s`, `*_s`.
    """

    name: str
    verdict: Verdict
    found: str
    fix: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.verdict == "ok") == (not self.fix), f"{self.name}: {self.verdict}, fix {self.fix!r}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "verdict": self.verdict,
            "found": self.found,
            "fix": self.fix or None,
            "numbers": dict(self.numbers),
        }


def judge(
    name: str,
    found: str,
    *,
    problem: str = "",
    warning: str = "",
    numbers: Mapping[str, float] | None = None,
) -> Check:
    """A check with the more severe of the two remedies; ok if both are empty."""
    verdict: Verdict = "problem" if problem else "warning" if warning else "ok"
    return Check(name=name, verdict=verdict, found=found, fix=problem or warning, numbers=numbers or {})


def format_rate(bytes_per_s: float) -> str:
    """`3.2 GB/s`, decimal, as in specifications of disks and links."""
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"
