"""When a sequence ends: transformers' stopping criteria, of which the usual ones need no tensor."""

from collections.abc import Iterable

from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria

from offload_moe.chat.sequence import TokenIds


class Stops:
    """Of one request."""

    def __init__(self, criteria: Iterable[StoppingCriteria]) -> None:
        self._most: list[int] = []
        self._stop_ids: set[int] = set()
        self._others: list[StoppingCriteria] = []
        for each in criteria:
            if type(each) is EosTokenCriteria:
                self._stop_ids.update(each.eos_token_id.flatten().tolist())
            elif type(each) is MaxLengthCriteria and not _may_warn(each):
                self._most.append(each.max_length)
            else:
                self._others.append(each)

    def are_met(self, sequence: TokenIds) -> bool:
        """Whether the sequence ends with its last token."""
        num_tokens, last = len(sequence), sequence.ids[-1]
        is_over = last in self._stop_ids or any(num_tokens >= most for most in self._most)
        return any([is_over, *(bool(each(sequence.tensor(), None).all()) for each in self._others)])


def _may_warn(criteria: MaxLengthCriteria) -> bool:
    """Whether it warns of a sequence beyond the model's positions."""
    most = criteria.max_position_embeddings
    return most is not None and most < criteria.max_length
