"""Counts the rows of calls that take hidden states ``[1, T, H]``; and what such passes leave in a cache."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer


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


def contents(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Of each layer copies of keys and values, or of the inputs of its convolution and its state."""
    return [(first.clone(), second.clone()) for first, second in map(_kept, cache.layers)]


def _kept(layer: Any) -> tuple[Tensor, Tensor]:
    if isinstance(layer, LinearAttentionLayer):
        return layer.conv_states[0], layer.recurrent_states[0]
    return layer.keys, layer.values
