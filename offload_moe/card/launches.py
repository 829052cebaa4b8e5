"""Sizes of launches, by the formulas of the kernels' headers: the host and the kernels cannot disagree."""

import re
from functools import cache, partial

from offload_moe.card.structs import HEADERS, KERNELS, constant

_MACRO = re.compile(r"^#define (\w+)\(([\w, ]+)\) ((?:.*\\\n)*.*)$", re.MULTILINE)
_CALLED = re.compile(r"[A-Z]\w+(?=\()")
_CONSTANT = re.compile(r"\b[A-Z]\w+\b(?!\()")


@cache
def launch(name: str, *sizes: int) -> int:
    """The value of a macro such as ``OM_LINEAR_BLOCKS(rows, cols)``, or of a constant."""
    if not sizes:
        return constant(name)
    parameters, expression = _macros()[name]
    values = {parameter: int(size) for parameter, size in zip(parameters, sizes, strict=True)}
    values |= {named: constant(named) for named in _CONSTANT.findall(expression) if named not in values}
    calls = {called: partial(launch, called) for called in _CALLED.findall(expression)}
    return int(eval(_python(expression), {"__builtins__": {}}, {**calls, **values}))


@cache
def _macros() -> dict[str, tuple[list[str], str]]:
    text = "\n".join((KERNELS / name).read_text(encoding="utf-8") for name in HEADERS)
    return {
        name: ([parameter.strip() for parameter in parameters.split(",")], expression.replace("\\\n", " "))
        for name, parameters, expression in _MACRO.findall(text)
    }


def _python(expression: str) -> str:
    """A C expression of whole numbers in Python's words: `c ? a : b` is `a if c else b`, and `/` is `//`."""
    expression = expression.strip()
    at = _top_level(expression, "?")
    if at >= 0:
        colon = at + 1 + _top_level(expression[at + 1 :], ":")
        condition, first, second = expression[:at], expression[at + 1 : colon], expression[colon + 1 :]
        return f"({_python(first)} if {_python(condition)} else {_python(second)})"
    parts, begin, depth = [], 0, 0
    for index, letter in enumerate(expression):
        if letter == "(":
            parts += [expression[begin : index + 1]] if depth == 0 else []
            begin = index + 1 if depth == 0 else begin
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                parts.append(", ".join(_python(part) for part in _arguments(expression[begin:index])))
                begin = index
    return "".join([*parts, expression[begin:]]).replace("//", "/").replace("/", "//")


def _arguments(text: str) -> list[str]:
    at = _top_level(text, ",")
    return [text] if at < 0 else [text[:at], *_arguments(text[at + 1 :])]


def _top_level(text: str, wanted: str) -> int:
    """Where a letter stands outside of parentheses (of `:`, the one of the outermost condition); -1: nowhere."""
    depth = nested = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and letter == wanted and nested == 0:
            return index
        nested += depth == 0 and wanted == ":" and letter == "?"
        nested -= depth == 0 and wanted == ":" and letter == ":" and nested > 0
    return -1
