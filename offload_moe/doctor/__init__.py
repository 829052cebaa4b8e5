"""Is this machine ready, and does the engine compute right on it?

The self-test is `offload_moe.doctor.self_test`: it needs the whole engine, which a doctor may not find in order.
"""

from offload_moe.doctor.check import Check, Verdict
from offload_moe.doctor.examination import examine
from offload_moe.doctor.redact import Redactor

__all__ = ["Check", "Redactor", "Verdict", "examine"]
