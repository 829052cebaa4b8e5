"""The outcome of a check of the self-test."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from offload_moe.errors import OffloadMoeError

Status = Literal["pass", "fail", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """found: the comparison and its result."""

    name: str
    status: Status
    found: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "status": self.status, "found": self.found, "seconds": round(self.seconds, 3)}


class Failed(Exception):
    """A check found a deviation."""


class Skipped(Exception):
    """A check cannot run, with the reason."""


def run_check(name: str, check: Callable[[], str]) -> Outcome:
    """check: returns its finding, or raises. An error of any layer below is a failure, not the end of the self-test."""
    begun = time.perf_counter()
    status: Status = "fail"
    try:
        found = check()
        status = "pass"
    except Skipped as reason:
        status, found = "skip", str(reason)
    except Failed as failure:
        found = str(failure)
    except (OffloadMoeError, RuntimeError, OSError, ValueError, TypeError, AssertionError, LookupError) as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Outcome(name=name, status=status, found=found, seconds=time.perf_counter() - begun)
