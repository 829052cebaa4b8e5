"""A conversation and its display: the state shared by the loop and the commands."""

from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

from ..failures import one_line
from ..status import status_line
from ..terminal import console, is_interactive, safe
from ..waiting import show_answer
from ..writer import AnswerWriter
from .keyboard import quiet_keyboard

if TYPE_CHECKING:
    from offload_moe.chat import ChatSession, Piece
    from offload_moe.engine.model import Model

    from .opening import Opened


class Talk:
    """One chat. `confirm` puts a yes-or-no question at the terminal; None without a terminal.

    opened: the model and the session, as soon as they are there.
    """

    def __init__(
        self,
        opened: "Callable[[], Opened]",
        sampling: Mapping[str, Any],
        *,
        is_plain: bool = False,
        is_debugging: bool = False,
    ) -> None:
        self._opened = opened
        self.sampling = dict(sampling)
        self.confirm: Callable[[str], bool] | None = None
        self.is_interactive = is_interactive()
        self._is_plain = is_plain
        self._is_debugging = is_debugging
        self._console = console(stderr=not self.is_interactive)

    @property
    def model(self) -> "Model":
        return self._opened().model

    @property
    def session(self) -> "ChatSession":
        return self._opened().session

    def wait(self) -> None:
        """Until the model is there. Raises: what loading raised."""
        self._opened()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line that is not part of an answer."""
        self._console.print(safe(text), style=style, soft_wrap=not self.is_interactive)

    def say_error(self, error: Exception) -> None:
        if self._is_debugging:
            self._console.print_exception()
        self.say(f"error: {one_line(error)}", style="red")

    def show(self, pieces: "Generator[Piece, None, None]") -> None:
        """Stream an answer. At the terminal an interrupt stops it, and the text so far stays in the conversation."""
        if not self.is_interactive:
            show_answer(self.session, pieces, AnswerWriter())
            return
        try:
            with quiet_keyboard():
                show_answer(self.session, pieces, AnswerWriter(self._console, is_plain=self._is_plain))
        except KeyboardInterrupt:
            pass
        except Exception as error:
            self.say_error(error)
            return
        finally:
            if self.session.withdrawn is not None:
                self.say(
                    "The message has no answer and was removed from the conversation. /retry sends it again.",
                    style="dim",
                )
        if self.session.last_stats is not None:
            self.say(status_line(self.session.last_stats, self._console.width) + "\n", style="dim")
