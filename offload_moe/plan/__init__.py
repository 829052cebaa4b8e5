"""Planning before loading: memory, placement and speed of a model, from its config alone."""

from offload_moe.plan.machine import Machine, Rates, measure_machine, with_card
from offload_moe.plan.plan import Plan, make_plan
from offload_moe.plan.plan_json import plan_to_json

__all__ = ["Machine", "Plan", "Rates", "make_plan", "measure_machine", "plan_to_json", "with_card"]
