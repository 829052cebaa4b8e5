"""Calls of gpt-oss: messages on a channel whose header names the function as recipient."""

import re
from collections.abc import Collection

from offload_moe.chat.reasoning import HarmonySplitter, Piece

RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.\-]+)")
CALL = "<|call|>"


class HarmonyCalls(HarmonySplitter):
    """A splitter that also says to which tool the present message goes. An unknown recipient's text is reasoning."""

    def __init__(self, tools: Collection[str], *, is_in_answer: bool = False) -> None:
        super().__init__(is_in_answer=is_in_answer)
        self._tools = tools
        self._header = ""
        self.recipient: str | None = None

    def text(self, text: str) -> list[Piece]:
        if self.kind is None:
            self._header += text
        return super().text(text)

    def marker(self, token: str) -> list[Piece]:
        if token == "<|message|>":
            found = RECIPIENT.search(self._header)
            self.recipient = found[1] if found is not None and found[1] in self._tools else None
        elif token in ("<|start|>", "<|end|>", CALL):
            self._header, self.recipient = "", None
        return super().marker(token)
