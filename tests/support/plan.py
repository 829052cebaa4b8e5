"""What the tests of the planner share: tiny model shapes, machines, configs on disk."""

from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from offload_moe.plan.machine import Machine
from offload_moe.plan.outlook import Task
from offload_moe.plan.parameters import ModelShape, describe_model
from offload_moe.plan.placement import Settings
from offload_moe.plan.source import open_source
from tests.support.tiny_models import COMMON, FAMILIES

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
GIB = 1 << 30


@cache
def real_shape(name: str) -> ModelShape:
    """The shape of a published model; building one takes up to a second."""
    return describe_model(open_source(CONFIGS / f"{name}.json").config)


def tiny_shape(family: str, **changes: Any) -> ModelShape:
    return describe_model(AutoConfig.for_model(family, **(COMMON | FAMILIES.get(family, {}) | changes)))


def task(shape: ModelShape, machine: Machine, **settings: Any) -> Task:
    return Task(shape=shape, machine=machine, settings=Settings(**({"context": 64, "codec": "nf4"} | settings)))
