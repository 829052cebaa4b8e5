"""What the card noted of a pass: routing, how experts were found, and which slots changed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offload_moe.card.structs import constant

HEAD, MISSED = constant("OM_CARD_LOG_HEAD"), constant("OM_CARD_MISSED")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLog:
    """One layer. ids, found ``[T, K]``; weights ``[T, K]`` fp32. changes: slot, evicted key, admitted key."""

    layer: int
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    found: NDArray[np.int32]
    changes: Sequence[tuple[int, int, int]]


def layers_of(
    ints: NDArray[np.int32], layers: Sequence[tuple[int, int]], *, max_rows: int, num_rows: int, number: int
) -> list[LayerLog]:
    """Of the pass of this number. ints ``[layers, n]``: the log. layers: number and top-k of those with experts."""
    found = []
    for layer, top_k in layers:
        line = ints[layer]
        if line[0] != number:
            continue
        most, count, (_, num_changes) = max_rows * top_k, num_rows * top_k, line[:HEAD].tolist()
        ids, weights, states, changes = (line[HEAD + part * most :] for part in range(4))
        found.append(
            LayerLog(
                layer=layer,
                ids=ids[:count].reshape(num_rows, top_k),
                weights=weights[:count].view(np.float32).reshape(num_rows, top_k),
                found=states[:count].reshape(num_rows, top_k),
                changes=[(a, b, c) for a, b, c in changes[: 3 * num_changes].reshape(-1, 3).tolist()],
            )
        )
    return found


def num_missed(ints: NDArray[np.int32], layers: Sequence[tuple[int, int]], *, max_rows: int, num_rows: int) -> int:
    """Pairs whose expert was not there, of all layers; layers as of `layers_of`."""
    top_k = layers[0][1]
    if any(each != top_k for _, each in layers):
        parts = [num_missed(ints, [layer], max_rows=max_rows, num_rows=num_rows) for layer in layers]
        return sum(parts)
    first = HEAD + 2 * max_rows * top_k
    states = ints[[layer for layer, _ in layers], first : first + num_rows * top_k]
    return int(np.count_nonzero(states == MISSED))
