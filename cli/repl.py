"""The chat loop: read a message, stream the answer, say what it cost."""

from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from .failures import one_line
from .lines import History, UnreadableMessageError, read_message, read_piped_line
from .slash import LeaveError, dispatch
from .status import status_line
from .terminal import console, is_interactive, safe, silent_keys
from .writer import AnswerWriter

if TYPE_CHECKING:
    from collections.abc import Generator

    from rich.console import Console

    from offload_moe.chat import ChatSession, Piece
    from offload_moe.model import Model


class Repl:
    """One chat at the terminal, or over a pipe: there each line is a turn and stdout carries the answers only."""

    def __init__(
        self, model: "Model", session: "ChatSession", sampling: Mapping[str, Any], *, is_debugging: bool = False
    ) -> None:
        self.model = model
        self.session = session
        self.sampling = dict(sampling)
        self._is_debugging = is_debugging
        self._is_interactive = is_interactive()
        self._console = console(stderr=not self._is_interactive)

    def run(self) -> int:
        """Chat until the end of input or /exit."""
        if not self._is_interactive:
            return self._run_piped()
        history = History()
        history.open()
        try:
            self._run_interactive()
        finally:
            history.close()
        return 0

    def say(self, text: str, style: str | None = None) -> None:
        """Something that is not an answer."""
        self._console.print(safe(text), style=style, soft_wrap=True)

    def show(self, pieces: "Generator[Piece, None, None]") -> None:
        """Stream an answer. At the terminal an interrupt stops it, and what was said stays in the conversation."""
        if not self._is_interactive:
            self._stream(pieces)
            return
        try:
            with silent_keys():
                self._stream(pieces, self._console)
        except KeyboardInterrupt:
            pass
        except Exception as error:
            self._say_error(error)
            return
        finally:
            if self.session.withdrawn is not None:
                self.say("Your message has no answer and is taken back; /retry sends it again.", style="dim")
        if self.session.last_stats is not None:
            self.say(status_line(self.session.last_stats, self._console.width) + "\n", style="dim")

    def _stream(self, pieces: "Generator[Piece, None, None]", reasoning: "Console | None" = None) -> None:
        writer = AnswerWriter(reasoning)
        try:
            with closing(pieces):
                for piece in pieces:
                    writer.write(piece)
        finally:
            writer.end()

    def _say_error(self, error: Exception) -> None:
        if self._is_debugging:
            self._console.print_exception()
        self.say(f"error: {one_line(error)}", style="red")

    def _run_interactive(self) -> None:
        while True:
            try:
                self._turn(read_message(input))
            except KeyboardInterrupt:
                # At the prompt: what was typed is thrown away.
                self.say("")
            except EOFError:
                self.say("")
                return
            except LeaveError:
                return
            except Exception as error:
                # Whatever went wrong with one line, the conversation is worth keeping.
                self._say_error(error)

    def _run_piped(self) -> int:
        status = 0
        while True:
            try:
                self._turn(read_message(read_piped_line))
            except UnreadableMessageError as error:
                self._say_error(error)
                status = 1
            except (EOFError, LeaveError):
                return status

    def _turn(self, message: str) -> None:
        if not message.strip():
            return
        if message.startswith("/") and not message.startswith("//"):
            dispatch(self, message)
            return
        # A doubled slash is how a message begins with one.
        text = message[1:] if message.startswith("//") else message
        self.show(self.session.send(text, **self.sampling))
