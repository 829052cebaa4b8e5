"""`serve --ray`: an ingress in this process, replicas on the nodes of a Ray cluster."""

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import ray

from offload_moe.cluster.failures import first_line
from offload_moe.cluster.ingress import Ingress
from offload_moe.cluster.keeper import Keeper
from offload_moe.cluster.replica import Job
from offload_moe.cluster.replicas import CONNECT_S, Replicas
from offload_moe.errors import ConfigError
from offload_moe.serve.config import ServeConfig
from offload_moe.serve.server import Server

OBJECT_STORE_BYTES = 100 << 20  # Ray's own memory, of which nothing here needs any
# Of a Ray that is started here: it would end a process whose model fills the memory, and report its use elsewhere.
LOCAL = {"RAY_memory_monitor_refresh_ms": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def serve_cluster(job: Job, config: ServeConfig, listener: socket.socket, *, on_ready: Callable[[], None]) -> bool:
    """Answer until a signal comes, then let answers end for the job's `drain_s`. Whether the signal was an interrupt.

    config: of the ingress; that of the job is of every replica. on_ready: called with the first replica.

    Raises: ConfigError where Ray cannot be reached, and what `load` raises where no node can load the model.
    """
    try:
        with _connected():
            return asyncio.run(_serve(job, config, listener, on_ready))
    finally:
        listener.close()


async def _serve(job: Job, config: ServeConfig, listener: socket.socket, on_ready: Callable[[], None]) -> bool:
    key = secrets.token_urlsafe(32)
    replicas = Replicas(key)
    ingress = Ingress(replicas, config, job.name)
    server = Server(ingress, ingress, job.drain_s)
    keeper = Keeper(replicas, replace(job, config=replace(job.config, api_key=key)))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    keeping = asyncio.create_task(keeper.keep())
    try:
        await asyncio.wait([serving, keeping, keeper.first], return_when=asyncio.FIRST_COMPLETED)
        if keeper.first.done():
            keeper.first.result()
            on_ready()
        await asyncio.wait([serving, keeping], return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            keeping.result()
    finally:
        server.should_exit = True
        keeping.cancel()
        await asyncio.gather(serving, keeping, return_exceptions=True)
        await replicas.close()
    return server.was_interrupted


@contextmanager
def _connected() -> Iterator[None]:
    """With the cluster at `RAY_ADDRESS`, or with a Ray of this process's own. Raises: ConfigError."""
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address is not None:
            _check(address)
            ray.init(address=address, logging_level="warning")
        else:
            os.environ.update({name: os.environ.get(name, value) for name, value in LOCAL.items()})
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level="warning",
            )
    except (OSError, RuntimeError, ValueError) as error:
        where = address or "this machine"
        raise ConfigError(
            f"Cannot reach Ray at {where}: {first_line(error).rstrip('.')}. This machine must be a node of the "
            "cluster: `ray start --head`, or `ray start --address HOST:6379`. Without RAY_ADDRESS one is started here."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Whether anything listens there: Ray tries for minutes. Raises: OSError, ValueError."""
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise ValueError("an address of Ray's client is not supported.")
    if host:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
