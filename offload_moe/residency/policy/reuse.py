"""A model of how soon an expert is used again, learned while the model decodes.

Shapes: X all experts of the pool, D features.
"""

import numpy as np

SLOW_HALF_LIFE, FAST_HALF_LIFE = 50.0, 3.0  # tokens
CONSTANT = 0.1
SHRINKAGE = 0.05  # weight of the slow frequency among the neighbours
PRIOR_WEIGHTS = (0.0, 0.5, 0.3, 0.05, 0.75, 1.0)
PRIOR_SAMPLES = 50.0  # evidence that the prior weights count as
WARM_UP = 8  # tokens before learning begins
LEARN_EVERY, SOLVE_EVERY = 4, 16  # tokens


class ReuseModel:
    """Expected `discount ** (tokens until the next use)`, linear in six features, fitted by least squares.

    The features of an expert: a constant; its use frequency with a long and with a short memory; whether this token
    used it; the prediction of the neighbours; and the slow frequency once more where there are no good neighbours.
    `csrc/ranking.c` computes the features and gathers the evidence.

    Source: least-squares temporal differences, Bradtke and Barto, Machine Learning 22, 1996; here a use ends the sum.
    """

    def __init__(self, num_keys: int, discount: float) -> None:
        num_features = len(PRIOR_WEIGHTS)
        self.use_discount(discount)
        self.features = np.zeros((num_features, num_keys), dtype=np.float32)  # [D, X]
        self.features[0] = CONSTANT
        self.weights = np.array(PRIOR_WEIGHTS, dtype=np.float32)
        self.covariance = np.eye(num_features) * PRIOR_SAMPLES
        self.evidence = np.array(PRIOR_WEIGHTS) * PRIOR_SAMPLES
        self._num_tokens = 0

    def use_discount(self, discount: float) -> None:
        """Discount by this in what is learned from now on."""
        self.discount = np.float32(discount)

    def advance(self) -> None:
        """Begin the next token; every `SOLVE_EVERY` tokens, fit the weights to the evidence."""
        self._num_tokens += 1
        if self._num_tokens % SOLVE_EVERY == 0:
            self.weights[:] = np.linalg.solve(self.covariance, self.evidence)

    @property
    def is_learning(self) -> bool:
        """Whether this token's uses are learned from."""
        return self._num_tokens > WARM_UP and self._num_tokens % LEARN_EVERY == 0

    @staticmethod
    def steps(num_tokens: int) -> tuple[float, float]:
        """The weights of `num_tokens` new tokens in the slow and the fast frequency."""
        return _STEPS if num_tokens == 1 else (_step(num_tokens, SLOW_HALF_LIFE), _step(num_tokens, FAST_HALF_LIFE))


def _step(num_tokens: int, half_life: float) -> float:
    return float(1 - 0.5 ** (num_tokens / half_life))


_STEPS = _step(1, SLOW_HALF_LIFE), _step(1, FAST_HALF_LIFE)  # of a decode step
