"""A model that is loaded while its first message is typed."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from offload_moe.system.progress import Progress, silent

from ..ending import LOADING
from ..progress import Meter, reporter
from .keyboard import quiet_keyboard

if TYPE_CHECKING:
    from offload_moe.chat import ChatSession
    from offload_moe.engine.model import Model

STEP_S = 0.1  # a wait without an end cannot be interrupted on Windows
LEAVE_S = 1.0  # a load ends at its next report; imports and downloads have none for longer


@dataclass(frozen=True, slots=True)
class Opened:
    """A loaded model and the conversation with it."""

    model: "Model"
    session: "ChatSession"


class StoppedError(Exception):
    """Ends a load whose model is not needed any more."""


class Opening:
    """Loads on a thread of its own, from the beginning of the context on; its end stops the load or closes the model.

    text: how far it is. announce: called once with what was opened, never by the loading thread.
    """

    def __init__(self, load: Callable[[Progress], Opened], announce: Callable[[Opened], None]) -> None:
        self.text = "Starting ..."
        self.error: BaseException | None = None
        self._load, self._announce = load, announce
        self._opened: Opened | None = None
        self.is_announced = self._is_stopping = False
        self._over = threading.Event()
        self._report: Progress = silent
        self._phase, self._meter = "", Meter(0.0)
        self._thread = threading.Thread(target=self._run, name=LOADING, daemon=True)

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def result(self) -> Opened:
        """Wait for the model, with a progress bar. Raises: what loading raised."""
        if not self.is_over:
            with quiet_keyboard(), reporter() as self._report:
                self._report(self._phase)
                while not self._over.wait(STEP_S):
                    pass
        self.announce()
        assert self._opened is not None
        return self._opened

    def announce(self) -> None:
        """Show what was opened, once it is. Raises: what loading raised."""
        if self.error is not None:
            raise self.error
        if self._opened is not None and not self.is_announced:
            self.is_announced = True
            self._announce(self._opened)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_stopping = True
        self._thread.join(LEAVE_S)
        if self._opened is not None:
            self._opened.model.close()

    def _run(self) -> None:
        try:
            self._opened = self._load(self._take)
        except BaseException as error:
            self.error = error
        finally:
            self._over.set()

    def _take(self, phase: str, done: float = -1.0, total: float | None = None) -> None:
        if self._is_stopping:
            raise StoppedError
        if phase != self._phase:
            self._phase, self._meter = phase, Meter(done)
        figures = self._meter.text(done, total)
        self.text = f"{phase}: {figures}" if figures else f"{phase} ..."
        self._report(phase, done, total)
