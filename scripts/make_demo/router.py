"""The router: a linear map from the hidden state to scores whose top-k are the experts that contribute most.

Shapes: N tokens, H hidden, E experts, K top-k.
"""

import torch
from torch import Tensor

# Logits this small make the softmax flat: the K chosen experts weigh 1/K each, to about one part in a thousand.
_LOGIT_SCALE = 2.0**-10


def top_k_mask(scores: Tensor, top_k: int) -> Tensor:
    """1.0 where a score is among its row's `top_k`, else 0.0; same shape."""
    return torch.zeros_like(scores).scatter_(1, scores.topk(top_k, dim=1).indices, 1.0)


def fit_router(normed: Tensor, energy: Tensor, ridge: float) -> Tensor:
    """Ridge regression of each expert's contribution norm on the hidden state: [E, H].

    `normed` [N, H] is what the router sees, `energy` [N, E] the squared norm of each expert's contribution.
    """
    target = energy.sqrt()
    target -= target.mean(dim=1, keepdim=True)
    return solve_ridge(normed.T @ normed, normed.T @ target, ridge).T


def finish_router(router: Tensor, normed: Tensor, top_k: int, ridge: float) -> Tensor:
    """The same order of experts with logits that bf16 can tell apart: small, and near zero where the top-k ends.

    bf16 keeps 8 bits of a logit, so it confuses neighbours that are large and close. Subtracting one row from all rows
    changes no order; the row that predicts the boundary between chosen and left-out experts puts that boundary at zero,
    where bf16 is finest.
    """
    scores = normed @ router.T
    ranked = scores.sort(dim=1, descending=True).values
    boundary = (ranked[:, top_k - 1 : top_k] + ranked[:, top_k : top_k + 1]) / 2
    shift = solve_ridge(normed.T @ normed, normed.T @ boundary, ridge).T
    centred = router - shift
    return centred * (_LOGIT_SCALE / (normed @ centred.T).std())


def solve_ridge(gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """Solve (gram + ridge * mean(diag gram) * I) x = moment."""
    return torch.cholesky_solve(moment, torch.linalg.cholesky(add_ridge(gram, ridge)))


def add_ridge(gram: Tensor, ridge: float) -> Tensor:
    """gram + ridge * mean(diag gram) * I."""
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram))
