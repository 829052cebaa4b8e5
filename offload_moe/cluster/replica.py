"""One replica: the process of a Ray actor that runs the server of one machine, for the ingress alone."""

import logging
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import offload_moe
from offload_moe.engine.load import load
from offload_moe.engine.model import Model
from offload_moe.engine.options import LoadOptions
from offload_moe.errors import ConfigError
from offload_moe.serve.config import ServeConfig
from offload_moe.serve.host import Host
from offload_moe.serve.server import listen, serve, url_of
from offload_moe.store.installed import fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every replica does. config: its key is the one that the ingress has."""

    model: str
    options: LoadOptions
    config: ServeConfig
    name: str
    drain_s: float = 60.0
    version: str = offload_moe.__version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Where a replica listens, and which store it has."""

    url: str
    fingerprint: str


class Replica:
    """`start`, then `run`, which returns when the process is to end."""

    def __init__(self, job: Job, address: str) -> None:
        """address: to listen on, at a port that is free."""
        self._job, self._config = job, replace(job.config, host=address, port=0)
        self._host: Host | None = None
        self._listener: socket.socket | None = None

    def start(self) -> Started:
        """Load the model and listen. Raises: OffloadMoeError, as `load` does."""
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        job = self._job
        if job.version != offload_moe.__version__:
            raise ConfigError(
                f"{socket.gethostname()} has offload-moe {offload_moe.__version__}, the ingress {job.version}. Install "
                "the same version on every machine."
            )
        model = self._load()
        self._host = Host(self._load, self._config, job.name)
        self._host.adopt(model)
        self._listener = listen(self._config)
        return Started(url=url_of(self._listener), fingerprint=fingerprint(Path(model.store.path)))

    def run(self) -> None:
        """Answer, in the process's main thread, until a signal comes."""
        assert self._host is not None
        assert self._listener is not None
        serve(self._host, self._listener, drain_s=self._job.drain_s, on_ready=lambda: None)

    def _load(self) -> Model:
        model = load(self._job.model, self._job.options)
        for text in (*model.notices, model.summary):
            logger.warning("%s", text)
        return model
