"""A server process: a socket, the application, and an end that lets answers end."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Protocol

import uvicorn
from starlette.types import ASGIApp

from offload_moe.errors import ConfigError
from offload_moe.serve.config import ServeConfig

if TYPE_CHECKING:
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


class Ending(Protocol):
    """What a server's end is about."""

    is_draining: bool

    def drain(self, limit_s: float) -> bool:
        """Refuse new requests and wait for those that are under way; False after the limit."""

    def stop(self) -> None:
        """End those that are left."""


class Server(uvicorn.Server):
    """The first signal lets answers end, within a limit; the second one ends them; the third one waits for nothing."""

    def __init__(self, app: ASGIApp, host: Ending, drain_s: float) -> None:
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=CLOSING_S,
        )
        super().__init__(settings)
        self._host, self._drain_s = host, drain_s
        self.was_interrupted = False
        self._num_signals = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A terminal that is closed is a signal as any other, unless SIGHUP is ignored (nohup)."""
        number = getattr(signal, "SIGHUP", None)
        is_main = threading.current_thread() is threading.main_thread()
        with super().capture_signals():
            if number is None or not is_main or signal.getsignal(number) is signal.SIG_IGN:
                yield
                return
            before = signal.signal(number, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(number, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.was_interrupted = self.was_interrupted or sig == signal.SIGINT
        self._num_signals += 1
        self._host.is_draining = True
        match self._num_signals:
            case 1:
                threading.Thread(target=self._drain, name="offload-moe drain", daemon=True).start()
            case 2:
                threading.Thread(target=self._host.stop, name="offload-moe end", daemon=True).start()
            case _:
                self.force_exit = self.should_exit = True

    def _drain(self) -> None:
        """Clients of what has not ended by then receive an error in their API's form."""
        self._host.drain(self._drain_s)
        self._host.stop()
        self.should_exit = True


def serve(host: "Host", listener: socket.socket, *, drain_s: float, on_ready: Callable[[], None]) -> bool:
    """Answer until a signal comes, then let answers end for `drain_s` seconds. Whether the signal was an interrupt.

    The host is closed at the end.
    """
    from offload_moe.serve.app import App  # with the engine: an address in use is an error before that is imported

    app = App(host)
    server = Server(app, host, drain_s)
    on_ready()
    try:
        server.run(sockets=[listener])
    finally:
        app.close()
        listener.close()
    return server.was_interrupted
