"""Placement and speed together, for comparisons after a change of one setting or one number of the machine."""

from dataclasses import dataclass

from offload_moe.plan.machine import Machine
from offload_moe.plan.parameters import ModelShape
from offload_moe.plan.placement import Placement, Settings, place
from offload_moe.plan.speed import Speed, forecast_speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The subject of a plan. download_bytes: still to be downloaded. is_store: already converted.

    shard_bytes: of the largest file of the download, None if unknown.
    """

    shape: ModelShape
    machine: Machine
    settings: Settings
    download_bytes: int = 0
    is_store: bool = False
    shard_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """speed: None if the model does not fit."""

    placement: Placement
    speed: Speed | None

    @property
    def tokens_per_s(self) -> float:
        return self.speed.tokens_per_s if self.speed is not None else 0.0


def look_ahead(task: Task) -> Outlook:
    """Place the model and, if it fits, forecast its speed."""
    placement = place(
        task.shape, task.machine, task.settings, download_bytes=task.download_bytes, is_store=task.is_store
    )
    if not placement.fits:
        return Outlook(placement=placement, speed=None)
    return Outlook(placement=placement, speed=forecast_speed(task.shape, task.machine, task.settings, placement))
