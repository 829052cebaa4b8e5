"""A terminal's screen, as far as answers use it: text, new lines, colours, cursor up, erasing."""

import re

from rich.cells import cell_len

_PART = re.compile(
    r"\x1b\[(?P<arguments>[0-9;]*)(?P<command>[A-Za-z])|(?P<control>[\x00-\x1f\x7f-\x9f])|[^\x00-\x1f\x7f-\x9f]+"
)


class FakeScreen:
    """Rows that grow downwards; none above the last `height` can be reached. Everything unexpected is an error."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows = [""]
        self.row = 0
        self.column = 0

    @property
    def text(self) -> str:
        return "\n".join(row.rstrip() for row in self.rows).rstrip("\n")

    def write(self, text: str) -> int:
        for part in _PART.finditer(text):
            if part["command"]:
                self._command(part["command"], int(part["arguments"].split(";")[0] or 1))
            elif part["control"]:
                self._control(part["control"])
            else:
                for letter in part[0]:
                    self._letter(letter)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True

    def _command(self, command: str, count: int) -> None:
        assert command in "mAJ", f"escape {command!r}"
        if command == "A":
            self.row = max(self.row - count, len(self.rows) - self.height, 0)
        elif command == "J":
            assert self.column == 0
            del self.rows[self.row :]
            self.rows.append("")

    def _control(self, control: str) -> None:
        assert control in "\r\n\t", f"control {control!r}"
        self.column = 0
        if control == "\n":
            self.row += 1
            self.rows += [""] * (self.row + 1 - len(self.rows))

    def _letter(self, letter: str) -> None:
        assert cell_len(self.rows[self.row]) == self.column, "written over what is there"
        # A letter that joins the one before it adds no cells.
        if cell_len(self.rows[self.row] + letter) > self.width:
            self._control("\n")
        self.rows[self.row] += letter
        self.column = cell_len(self.rows[self.row])
