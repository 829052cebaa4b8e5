"""Counts the rows of calls that take hidden states ``[1, T, H]``."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor


def rows_of_calls(
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str = "__call__",
    check: Callable[[Any], None] = lambda called: None,
) -> list[int]:
    """Grows by the number of rows of each call of this method. check: is given what is called, before."""
    calls: list[int] = []
    call = getattr(owner, name)

    def counted(self: object, x: Tensor, *args: Any) -> Tensor:
        check(self)
        calls.append(x.shape[1])
        result: Tensor = call(self, x, *args)
        return result

    monkeypatch.setattr(owner, name, counted)
    return calls
