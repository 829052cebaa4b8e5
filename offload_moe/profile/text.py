"""Text classes of tokens."""

from collections.abc import Iterable
from typing import Any
from unicodedata import category

import numpy as np
from numpy.typing import NDArray

CLASSES = ("letters", "number", "punctuation", "code", "whitespace", "special", "other")
_APOSTROPHES = "'\u2019"
_CODE = frozenset("{}[]<>=+*/\\|&^%$#@~_`")


def classify(text: str) -> str:
    """The class of one token's text without surrounding spaces.

    code: has a symbol of programming languages, or two brackets or more; punctuation: the marks of prose only.
    """
    core = text.strip()
    if not core:
        return "whitespace" if text else "special"
    if any(mark in _CODE for mark in core) or sum(core.count(mark) for mark in "()") > 1:
        return "code"
    if all(category(mark).startswith("P") for mark in core):
        return "punctuation"
    if any(mark.isdigit() for mark in core) and all(mark.isdigit() or mark in ".,:-" for mark in core):
        return "number"
    return "letters" if all(mark.isalpha() or mark in _APOSTROPHES for mark in core) else "other"


def classes_of(tokenizer: Any, token_ids: Iterable[int]) -> dict[str, list[int]]:
    """The distinct ids by the class of their text, in the form of a trace's metadata."""
    special = set(tokenizer.all_special_ids)
    found: dict[str, list[int]] = {}
    for token in sorted(set(token_ids)):
        name = "special" if token in special else classify(tokenizer.decode([token]))
        found.setdefault(name, []).append(token)
    return found


def class_per_token(token_ids: NDArray[Any], classes: dict[str, list[int]]) -> NDArray[np.int64]:
    """[T]: index into `CLASSES`; a token without a class is "other"."""
    codes = np.full(len(token_ids), CLASSES.index("other"))
    for name, ids in classes.items():
        codes[np.isin(token_ids, ids)] = CLASSES.index(name)
    return codes
