"""What the card noted of a pass: routing, how experts were found, and which slots changed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offload_moe.card.structs import constant

HEAD, MISSED = constant("OM_CARD_LOG_HEAD"), constant("OM_CARD_MISSED")


class LayerLog(NamedTuple):
    """One layer. ids, found: of T * K pairs. changes: slot, evicted key, admitted key."""

    layer: int
    ids: list[int]
    found: list[int]
    changes: Sequence[tuple[int, int, int]]


def layers_of(
    ints: NDArray[np.int32], layers: Sequence[tuple[int, int]], *, max_rows: int, num_rows: int, number: int
) -> list[LayerLog]:
    """Of the pass of this number. ints ``[layers, n]``: the log. layers: number and top-k of those with experts."""
    found = []
    numbers, num_changes = ints[:, 0].tolist(), ints[:, 1].tolist()
    pairs = {top_k: _pairs(ints, max_rows * top_k, num_rows * top_k) for top_k in {top_k for _, top_k in layers}}
    for layer, top_k in layers:
        if numbers[layer] == number:
            ids, states = pairs[top_k]
            first = HEAD + 3 * max_rows * top_k
            flat = ints[layer, first : first + 3 * num_changes[layer]].tolist() if num_changes[layer] else []
            changes = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
            found.append(LayerLog(layer, ids[layer], states[layer], changes))
    return found


def _pairs(ints: NDArray[np.int32], most: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Of all layers: ids, and how each was found."""
    return ints[:, HEAD : HEAD + count].tolist(), ints[:, HEAD + 2 * most : HEAD + 2 * most + count].tolist()


def num_missed(ints: NDArray[np.int32], layers: Sequence[tuple[int, int]], *, max_rows: int, num_rows: int) -> int:
    """Pairs whose expert was not there, of all layers; layers as of `layers_of`."""
    top_k = layers[0][1]
    if any(each != top_k for _, each in layers):
        parts = [num_missed(ints, [layer], max_rows=max_rows, num_rows=num_rows) for layer in layers]
        return sum(parts)
    first = HEAD + 2 * max_rows * top_k
    states = ints[[layer for layer, _ in layers], first : first + num_rows * top_k]
    return int(np.count_nonzero(states == MISSED))
