"""A server process: a socket, the application, and an end that lets answers end."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from offload_moe.errors import ConfigError
from offload_moe.serve.app import App
from offload_moe.serve.config import ServeConfig
from offload_moe.serve.host import Host

BACKLOG = 128
CLOSING_S = 2  # for connections whose answers have ended


def listen(config: ServeConfig) -> socket.socket:
    """A socket at the address. Raises: ConfigError when it cannot be bound."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"Cannot listen on {config.host}:{config.port}: {getattr(error, 'strerror', None) or error}. Choose "
            "another --port or --host, or end the server that has it."
        ) from error


def url_of(listener: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


class _Server(uvicorn.Server):
    """The first signal lets answers end, within a limit; the second one ends them; the third one waits for nothing."""

    def __init__(self, config: uvicorn.Config, host: Host, drain_s: float) -> None:
        super().__init__(config)
        self._host, self._drain_s = host, drain_s
        self.was_interrupted = False
        self._num_signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.was_interrupted = self.was_interrupted or sig == signal.SIGINT
        self._num_signals += 1
        self._host.is_draining = True
        match self._num_signals:
            case 1:
                threading.Thread(target=self._drain, name="offload-moe drain", daemon=True).start()
            case 2:
                threading.Thread(target=self._host.worker.close, name="offload-moe end", daemon=True).start()
            case _:
                self.force_exit = self.should_exit = True

    def _drain(self) -> None:
        """Clients of what has not ended by then receive an error in their API's form."""
        self._host.drain(self._drain_s)
        self._host.worker.close()
        self.should_exit = True


@contextmanager
def _drained_at_hangup(server: _Server) -> Iterator[None]:
    """A terminal that is closed is a signal as any other, unless SIGHUP is ignored (nohup)."""
    number = getattr(signal, "SIGHUP", None)
    is_main = threading.current_thread() is threading.main_thread()
    if number is None or not is_main or signal.getsignal(number) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(number, server.handle_exit)
    try:
        yield
    finally:
        signal.signal(number, before)


def serve(host: Host, listener: socket.socket, *, drain_s: float, on_ready: Callable[[], None]) -> bool:
    """Answer until a signal comes, then let answers end for `drain_s` seconds. Whether the signal was an interrupt.

    The host is closed at the end.
    """
    app = App(host)
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=CLOSING_S,
    )
    server = _Server(settings, host, drain_s)
    on_ready()
    try:
        with _drained_at_hangup(server):
            server.run(sockets=[listener])
    finally:
        app.close()
        listener.close()
    return server.was_interrupted
