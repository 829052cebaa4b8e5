"""Waits with a limit, which counts only time in which the process could run."""

import threading
from collections.abc import Callable

STEP_S = 1.0  # a process that was stopped (SIGSTOP, a debugger) or asleep for longer has waited no longer than this


def wait_step(changed: threading.Condition, limit_s: float, clock: Callable[[], float]) -> float:
    """Until something may have changed, a step at most (lock held). Returns the seconds that count against a limit."""
    step_s, began = min(limit_s, STEP_S), clock()
    changed.wait(step_s)
    return min(clock() - began, step_s)
