"""Checks of the machine, and of the engine's results on it.

The self-test is in `offload_moe.doctor.self_test` and imported separately, because it needs the whole engine, which
may not import on a machine with problems.
"""

from offload_moe.doctor.check import Check, Verdict
from offload_moe.doctor.examination import examine
from offload_moe.doctor.redact import Redactor

__all__ = ["Check", "Redactor", "Verdict", "examine"]
