"""The beginning of a stream, held back until its first token: before that another replica may give it anew."""

import re

# Events that come before the first token. Comments and a prompt's progress go through: they say nothing of the answer.
HELD = re.compile(rb"event: (?:message_start|response\.created|response\.in_progress)\n")
PASSING = re.compile(rb":|event: ping\n|data: \{.*\"choices\":\[\],.*\"prompt_progress\":", re.DOTALL)
WAITING = b": waiting\n\n"
END = b"\n\n"


class Opening:
    """Server-sent events on their way to a client, whole ones only. has_token: whether a token has gone there."""

    def __init__(self) -> None:
        self.has_token = False
        self._rest = b""
        self._held: list[bytes] = []

    def begin(self) -> None:
        """A replica begins to answer; what another one did not get to give is dropped."""
        self._rest = b""
        self._held.clear()

    def pass_on(self, part: bytes) -> bytes:
        """What may go to the client now."""
        whole, end, self._rest = (self._rest + part).rpartition(END)
        if not end or self.has_token:
            return whole + end
        return b"".join(self._pass(event + END) for event in whole.split(END))

    def _pass(self, event: bytes) -> bytes:
        if self.has_token:
            return event
        if HELD.match(event):
            self._held.append(event)
            return WAITING  # in its place, so that the connection stays alive
        if PASSING.match(event):
            return event
        self.has_token = True
        return b"".join(self._held) + event
