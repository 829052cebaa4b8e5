"""Lines of docstrings that describe a parameter or field, as list items. An extension of griffe."""

import re
from typing import Any

from griffe import Class, Extension, Function, Object

DESCRIBED = re.compile(r"([a-z_]+(?:, [a-z_]+)*): ")


class DescribedNames(Extension):
    def on_class(self, *, cls: Class, **_: Any) -> None:
        _make_list(cls, set(cls.members))

    def on_function(self, *, func: Function, **_: Any) -> None:
        _make_list(func, {parameter.name for parameter in func.parameters})


def _make_list(described: Object, names: set[str]) -> None:
    if described.docstring is None:
        return
    lines = [""]
    for line in described.docstring.value.splitlines():
        match = DESCRIBED.match(line)
        if match and names.issuperset(match[1].split(", ")):
            begins_a_list = lines[-1] and not any(before.startswith("- ") for before in _paragraph(lines))
            lines += [""] if begins_a_list else []
            line = f"- **{match[1]}**: {line[match.end() :]}"
        lines.append(line)
    described.docstring.value = "\n".join(lines[1:])


def _paragraph(lines: list[str]) -> list[str]:
    """The lines behind the last empty one."""
    return lines[max(at for at, line in enumerate(lines) if not line) :]
