"""Second moments of a matrix's inputs, by which the errors of its columns are weighed.

K in features, P is K rounded up to a multiple of 64.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from offload_moe.quant.layout import BLOCK

Moments = Mapping[str, Tensor]
"""Matrix -> fp32 ``[K]``, the mean square of each input, or ``[K, K]``, the means of their products."""
NO_MOMENTS: Moments = MappingProxyType({})

LEAST_WEIGHT = 1e-3  # of a block's mean: no column is without bounds


def column_weights(moments: Tensor, padded_in: int) -> Tensor:
    """fp32 ``[P]``: the mean squares, over their mean in each block of 64; 1 in a block without inputs."""
    squares = moments.diagonal() if moments.dim() == 2 else moments
    blocks = functional.pad(squares.float(), (0, padded_in - len(squares))).view(-1, BLOCK)
    means = blocks.mean(dim=1, keepdim=True)
    return torch.where(means > 0, blocks / means, 1.0).clamp(min=LEAST_WEIGHT).flatten()
