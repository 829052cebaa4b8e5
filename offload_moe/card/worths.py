"""The worth of experts by a policy, as the card compares it: a byte each, eight in one edit. Imports no torch.

X keys.
"""

import numpy as np
from numpy.typing import NDArray

MOST = 255  # OM_CARD_MOST_WORTH
AT_ONCE = 8


def in_bytes(worths: NDArray[np.float32]) -> NDArray[np.uint8]:
    """``[X] -> [X]``; all from 1 on are equal, and so are those of no worth."""
    scaled = np.minimum(np.maximum(worths, 0), 1)
    scaled *= MOST
    return scaled.astype(np.uint8)


def in_groups(worths: NDArray[np.float32]) -> NDArray[np.uint64]:
    """``[X] -> [ceil(X / 8)]``: the values of edits."""
    padded = np.zeros(-(-len(worths) // AT_ONCE) * AT_ONCE, dtype=np.uint8)
    padded[: len(worths)] = in_bytes(worths)
    return padded.view(np.uint64)
