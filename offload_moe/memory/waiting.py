"""Waits with a limit that counts only time in which the process could run."""

import threading
from collections.abc import Callable

STEP_S = 1.0  # a wait during which the process was stopped (SIGSTOP, a debugger, sleep) counts no more than this


def wait_step(changed: threading.Condition, limit_s: float, clock: Callable[[], float]) -> float:
    """Wait until something may have changed, `STEP_S` at most (lock held).

    Returns the seconds that count against a limit.
    """
    step_s, began = min(limit_s, STEP_S), clock()
    changed.wait(step_s)
    return min(clock() - began, step_s)
