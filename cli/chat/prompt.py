"""The prompt at a terminal: a line editor with history and completion, in which a pasted text is one message."""

import asyncio
from dataclasses import dataclass

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, get_app_session
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.vt100 import Vt100_Output

from ..lines import CONTINUATION, PROMPT, QUOTES
from .completion import CommandCompleter
from .opening import Opening

MENU_ROWS = 6
REDRAW_S = 0.2


@dataclass
class CancelledError(Exception):
    """Ctrl-C at the prompt."""

    was_empty: bool


class Prompt:
    """Reads messages.

    Enter sends, unless the line ends in a backslash or the message began with quotes that are still open; Alt-Enter
    begins a new line. Above the line stands how far a load is that goes on; what is printed at its end comes before it.
    """

    def __init__(self, history: History, opening: Opening | None = None) -> None:
        self._is_block = False
        self._opening = opening
        output = get_app_session().output
        if isinstance(output, Vt100_Output):
            # A request for the cursor position takes a round trip, and some terminals never reply.
            output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            self._message,
            multiline=True,
            prompt_continuation=lambda _, __, wrap_count: "" if wrap_count else CONTINUATION,
            history=history,
            completer=CommandCompleter(),
            complete_while_typing=False,
            reserve_space_for_menu=MENU_ROWS,
            enable_suspend=True,
            key_bindings=self._keys(),
            output=output,
        )

    def read(self) -> str:
        """The next message.

        Raises:
            CancelledError: Ctrl-C.
            EOFError: Ctrl-D on an empty line.
            Exception: that of a load which failed meanwhile.
        """
        self._is_block = False
        try:
            message = self._session.prompt(pre_run=self._watch_load)
        except KeyboardInterrupt:
            raise CancelledError(was_empty=not self._session.default_buffer.text) from None
        return self._without_quotes(message)

    def confirm(self, question: str) -> bool:
        """Whether the answer is yes. Ctrl-C and Ctrl-D are no."""
        try:
            answer = PromptSession[str](f"{question} [y/N] ").prompt()
        except (KeyboardInterrupt, EOFError):
            return False
        return answer.strip().lower() in ("y", "yes")

    def _message(self) -> str:
        if self._opening is None or self._opening.is_over:
            return PROMPT
        return f"{self._opening.text}\n{PROMPT}"

    def _watch_load(self) -> None:
        if self._opening is not None and not self._opening.is_announced:
            get_app().create_background_task(self._follow(self._opening))

    async def _follow(self, opening: Opening) -> None:
        """Draw the prompt anew while the load goes on, then leave it by the load's error, or announce the model."""
        app, shown = get_app(), ""
        while not opening.is_over:
            if opening.text != shown:
                shown = opening.text
                app.invalidate()
            await asyncio.sleep(REDRAW_S)
        if opening.error is None:
            # Without leaving the line editor's mode of the terminal, in which keys typed meanwhile keep their meaning.
            app.renderer.erase()
            opening.announce()
            app.invalidate()
        elif not app.is_done:
            app.exit(exception=opening.error)

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        keys.add("enter")(self._enter)
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        return keys

    def _enter(self, event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_state = None
        elif buffer.text.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif self._is_open_block(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    def _is_open_block(self, text: str) -> bool:
        """Quotes begin a block only if Enter follows on their line; in a pasted text they are text."""
        begun = text.strip()
        if not begun.startswith(QUOTES):
            self._is_block = False
        elif "\n" not in begun:
            self._is_block = True
        is_closed = len(begun) >= 2 * len(QUOTES) and begun.endswith(QUOTES)
        return self._is_block and not is_closed

    def _without_quotes(self, message: str) -> str:
        return message.strip().removeprefix(QUOTES).removesuffix(QUOTES).strip("\n") if self._is_block else message
