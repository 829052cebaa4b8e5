"""Top-p without sorting the vocabulary: the tokens that transformers keeps, found among the likeliest few.

V vocabulary.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper

NUM_LIKELIEST = 1024  # of which the kept ones are a part, as a rule
SHORT_VOCABULARY = 4 * NUM_LIKELIEST  # is sorted as fast
LEAST_MARGIN = 1e-4  # of a sum of probabilities: beyond what rounding may add to it, here and in transformers


class TopP(LogitsProcessor):
    """Keeps what a `TopPLogitsWarper` keeps. Where rounding or the order of equal scores decides, that one is used."""

    def __init__(self, warper: TopPLogitsWarper) -> None:
        self._warper = warper

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: ``[1, V]``."""
        kept = None if _is_sorted_as_fast(scores) else likeliest(scores[0], self._warper.top_p)
        if kept is None or kept.shape[0] < self._warper.min_tokens_to_keep:
            found: Tensor = self._warper(input_ids, scores)
            return found
        result = torch.full_like(scores, self._warper.filter_value)
        result[0, kept] = scores[0, kept]
        return result


def likeliest(scores: Tensor, top_p: float) -> Tensor | None:
    """The fewest tokens whose probabilities have a sum of top_p. None where they are many or rounding would decide.

    scores: ``[V]``.
    """
    values, tokens = scores.topk(NUM_LIKELIEST)
    is_all = values[-1] == -torch.inf
    weights = (values - values[0]).exp()
    total = weights.sum() if is_all else (scores - values[0]).exp().sum()
    sums = (weights.double().cumsum(0) / total).numpy()  # of each and all before it
    count = int(sums.searchsorted(top_p)) + 1
    if count >= NUM_LIKELIEST or values[count - 1] == values[count]:
        return None
    before = sums[count - 2] if count > 1 else -1.0  # the first one is kept anyway
    is_clear = sums[count - 1] - top_p > LEAST_MARGIN and top_p - before > LEAST_MARGIN  # false for NaN
    return tokens[:count] if is_clear else None


def _is_sorted_as_fast(scores: Tensor) -> bool:
    return scores.device.type != "cpu" or scores.shape[0] != 1 or scores.shape[1] < SHORT_VOCABULARY
