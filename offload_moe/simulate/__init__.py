"""The runtime's own scheduler in virtual time: the speed of a described machine on a routing trace."""

from offload_moe.simulate.costs import DiskModel, LinkModel, LookaheadModel, PassCosts, RunCosts
from offload_moe.simulate.result import Simulation, simulation_to_json
from offload_moe.simulate.run import simulate
from offload_moe.simulate.runtime import VirtualPools
from offload_moe.simulate.synthetic import synthetic_trace
from offload_moe.simulate.workload import Answer, answers_of

__all__ = [
    "Answer",
    "DiskModel",
    "LinkModel",
    "LookaheadModel",
    "PassCosts",
    "RunCosts",
    "Simulation",
    "VirtualPools",
    "answers_of",
    "simulate",
    "simulation_to_json",
    "synthetic_trace",
]
