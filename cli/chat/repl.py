"""The chat loop: read a message, stream the answer, print its statistics."""

from typing import TYPE_CHECKING

from offload_moe.system.paths import state_dir

from ..lines import UnreadableMessageError, read_message, read_piped_line
from .commands import LeaveError, dispatch, is_command
from .talk import Talk

if TYPE_CHECKING:
    from .opening import Opening


def run_chat(talk: Talk, opening: "Opening | None" = None) -> int:
    """Chat until the end of input or /exit. Over a pipe each line is a turn and stdout carries the answers only.

    opening: where the model is still being loaded.
    """
    try:
        if talk.is_interactive:
            _run_interactive(talk, opening)
        else:
            return _run_piped(talk)
    except LeaveError:
        pass
    return 0


def take_turn(talk: Talk, message: str) -> None:
    """Run a command, or answer a message. A message that begins with a slash is typed with two."""
    if not message.strip():
        return
    if is_command(message):
        dispatch(talk, message)
        return
    text = message[1:] if message.startswith("//") else message
    talk.show(talk.session.send(text, **talk.sampling))


def _run_interactive(talk: Talk, opening: "Opening | None") -> None:
    from .history import MessageHistory
    from .prompt import CancelledError, Prompt

    prompt = Prompt(MessageHistory(state_dir() / "chat_history.jsonl"), opening)
    talk.confirm = prompt.confirm
    was_cancelled = False
    while True:
        try:
            take_turn(talk, prompt.read())
            was_cancelled = False
        except CancelledError as cancelled:
            if cancelled.was_empty and opening is not None and not opening.is_over:
                raise KeyboardInterrupt from None
            if cancelled.was_empty and was_cancelled:
                raise LeaveError from None
            if cancelled.was_empty:
                talk.say("Press Ctrl-C again or Ctrl-D to leave.", style="dim")
            was_cancelled = cancelled.was_empty
        except EOFError:
            raise LeaveError from None
        except LeaveError:
            raise
        except Exception as error:
            if opening is not None and error is opening.error:
                raise
            # An error in one line must not end the conversation.
            talk.say_error(error)


def _run_piped(talk: Talk) -> int:
    """A line that is not in stdin's encoding is reported, and the next one is read."""
    status = 0
    while True:
        try:
            take_turn(talk, read_message(read_piped_line))
        except UnreadableMessageError as error:
            talk.say_error(error)
            status = 1
        except (EOFError, LeaveError):
            return status
