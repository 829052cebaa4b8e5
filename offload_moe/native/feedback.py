"""Error feedback: later columns of a matrix take up the errors of earlier ones, as far as their inputs go together.

O out features, P padded in features. Source: GPTQ (Frantar et al. 2022), section 3.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_moe.native.bindings import library
from offload_moe.quant.layout import BLOCK, round_up
from offload_moe.quant.nf4 import block_absmax

DAMPING = 0.01  # of the mean square, which is added to each: inputs that nearly depend on each other keep bounds
MORE_DAMPING = (0.0, 0.1, 1.0, 10.0)  # where rounding leaves the products indefinite


@dataclass(frozen=True, slots=True)
class Feedback:
    """The order of a matrix's columns ``[P]``, and the share ``[P, P]`` of a column's error that each later one takes.

    Important columns come first, so that their errors have the most columns to go to.
    """

    order: Tensor
    shares: Tensor


def feedback_of(moments: Tensor, padded: int) -> Feedback:
    """The feedback of a matrix. moments: fp32 ``[K, K]``, the means of products of its inputs. padded: P."""
    products = _damped(moments, padded)
    order = products.diagonal().argsort(descending=True, stable=True)
    return Feedback(order, _shares(products[order][:, order]))


def feed_back(rows: Tensor, planes: Mapping[str, Tensor], feedback: Feedback) -> dict[str, Tensor]:
    """The nf4 planes of rows ``[O, P]`` with other codes, of less error on their inputs; scales stay as they are."""
    num_rows, padded = rows.shape
    order, shares = feedback.order, feedback.shares
    width = round_up(num_rows, BLOCK)
    scales = torch.zeros(padded // BLOCK, width)
    scales[:, :num_rows] = block_absmax(planes).view(num_rows, -1).T
    values = torch.zeros(padded, width)
    values[:, :num_rows] = rows.T[order]
    codes = torch.empty(padded, width, dtype=torch.uint8)
    for first in range(0, padded, BLOCK):
        columns = slice(first, first + BLOCK)
        inside = shares[columns, columns].contiguous()
        of_columns = scales[order[columns] // BLOCK]
        library().om_feed_back_nf4(
            values[columns].data_ptr(),
            of_columns.data_ptr(),
            inside.data_ptr(),
            width,
            codes[columns].data_ptr(),
        )
        values[first + BLOCK :] -= shares[columns, first + BLOCK :].T @ values[columns]
    in_place = torch.empty(num_rows, padded, dtype=torch.uint8)
    in_place[:, order] = codes[:, :num_rows].T
    return {**planes, "codes": in_place[:, 0::2] << 4 | in_place[:, 1::2]}


def _damped(moments: Tensor, padded: int) -> Tensor:
    """``[P, P]`` over the mean square; columns of zeros are independent."""
    products = torch.zeros(padded, padded)
    products[: len(moments), : len(moments)] = moments
    diagonal = products.diagonal()
    mean = diagonal.mean()
    if mean > 0:
        products /= mean
    diagonal += DAMPING
    return products


def _shares(products: Tensor) -> Tensor:
    """``[P, P]``: the share of a column's error that goes to each later column, as the best columns after it take it.

    The rows of the upper Cholesky factor of the inverse, over their diagonal.
    """
    factor = _lower_factor(products.flip(0, 1)).flip(0, 1)  # products = factor @ factor.T, upper
    inverse: Tensor = torch.linalg.solve_triangular(factor, torch.eye(len(factor)), upper=True)
    return inverse / inverse.diagonal()[:, None]


def _lower_factor(products: Tensor) -> Tensor:
    """The Cholesky factor; of 1, so that no column takes up an error, for products that are of no inputs."""
    for damping in MORE_DAMPING:
        products.diagonal().add_(damping)
        factor: Tensor
        factor, first_bad = torch.linalg.cholesky_ex(products)
        if not first_bad:
            return factor
    return torch.eye(len(products))
