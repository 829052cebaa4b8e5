"""Starts a replica in every slot of a Ray cluster, and another one where one has died or a node has come."""

import asyncio
import logging
import time
from contextlib import suppress
from itertools import count

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offload_moe.cluster.failures import Failures, first_line, named
from offload_moe.cluster.replica import Job, Replica, Started
from offload_moe.cluster.replicas import Replicas
from offload_moe.cluster.slots import Slot, slots_of
from offload_moe.errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at the nodes
LEAST_WAIT_S, MOST_WAIT_S = 1.0, 60.0  # before a replica is started anew, twice as long each time
STEADY_S = 60.0  # a replica that was up for so long is started anew without waiting longer


class Keeper:
    """One task for each slot, in the event loop of the ingress."""

    def __init__(self, replicas: Replicas, job: Job) -> None:
        self._replicas, self._job = replicas, job
        self._actor = ray.remote(max_restarts=0)(Replica)
        self._own_address = ray.util.get_node_ip_address()
        self._numbers = count(1)
        self._holding: dict[Slot, asyncio.Task[None]] = {}
        self._fingerprint: str | None = None
        self._failures = Failures()
        self.first: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def keep(self) -> None:
        """Until it is cancelled. `first` is done with the first replica, or once every slot has failed to have one.

        Raises: ConfigError when Ray has ended.
        """
        try:
            while True:
                self._hold(await asyncio.to_thread(self._find))
                await asyncio.sleep(LOOK_S)
        except RayError as error:
            raise ConfigError(
                f"Ray does not answer any more: {first_line(error)} Start it, then this command."
            ) from error
        finally:
            for task in self._holding.values():
                task.cancel()
            await asyncio.gather(*self._holding.values(), return_exceptions=True)

    def _find(self) -> list[Slot]:
        options = self._job.options
        uses_gpus = options.device is None or not options.device.startswith("cpu")
        return slots_of(ray.nodes(), uses_gpus=uses_gpus, has_ram_limit=options.ram is not None)

    def _hold(self, slots: list[Slot]) -> None:
        for slot in self._holding.keys() - set(slots):
            self._holding.pop(slot).cancel()
            self._failures.forget(slot)
        for slot in slots:
            if slot not in self._holding:
                self._holding[slot] = asyncio.create_task(self._keep_one(slot))

    async def _keep_one(self, slot: Slot) -> None:
        wait_s = LEAST_WAIT_S
        while True:
            began_at = time.monotonic()
            try:
                await self._run(slot)
            except Exception as error:  # else this slot would end silently
                self._note(slot, error)
            if time.monotonic() - began_at > STEADY_S:
                wait_s = LEAST_WAIT_S
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MOST_WAIT_S)

    async def _run(self, slot: Slot) -> None:
        """One replica, from its start to its end. Raises: RayError, ConfigError."""
        name = f"{slot.address}-{next(self._numbers)}"
        actor = self._actor.options(
            num_cpus=slot.num_cpus,
            num_gpus=slot.num_gpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node, soft=False),
        ).remote(self._job, "127.0.0.1" if slot.address == self._own_address else slot.address)
        try:
            self._check(name, await actor.start.remote())
            if not self.first.done():
                self.first.set_result(None)
            await actor.run.remote()
        finally:
            self._replicas.remove(name)
            with suppress(RayError):  # of a cluster that has ended
                ray.kill(actor)

    def _check(self, name: str, started: Started) -> None:
        """Let it take requests. Raises: ConfigError where its answers would be those of another store."""
        self._fingerprint = self._fingerprint or started.fingerprint
        if started.fingerprint != self._fingerprint:
            raise ConfigError(
                f"Replica {name} has another store than the first one: fingerprint {started.fingerprint}, not "
                f"{self._fingerprint}. Copy the same store to every machine."
            )
        self._replicas.add(name, started.url)

    def _note(self, slot: Slot, error: Exception) -> None:
        cause: BaseException = getattr(error, "cause", None) or error  # of a task, whose own error it was
        logger.warning("A replica at %s has ended: %s", slot.address, named(cause))
        if not self.first.done() and (final := self._failures.note(slot, cause, self._holding.keys())) is not None:
            self.first.set_exception(final)
