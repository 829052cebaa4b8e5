"""Begin and end of a fenced code block in Markdown."""

import re
from dataclasses import dataclass

_OPENING = re.compile(r"^\s*(?P<mark>`{3,}|~{3,})(?P<info>[^`]*)$")


@dataclass(frozen=True, slots=True)
class Fence:
    """An open code block: its opening marker and its language."""

    mark: str
    language: str

    @classmethod
    def opened_by(cls, line: str) -> "Fence | None":
        """The block that this line opens, or None."""
        match = _OPENING.match(line.rstrip("\n"))
        if match is None:
            return None
        return cls(match["mark"], next(iter(match["info"].split()), ""))

    def is_closed_by(self, line: str) -> bool:
        mark = line.strip()
        return len(mark) >= len(self.mark) and set(mark) == {self.mark[0]}

    def may_be_closed_by(self, beginning: str) -> bool:
        """Whether a line with this beginning can still become the closing fence."""
        return set(beginning.strip()) <= {self.mark[0]}
