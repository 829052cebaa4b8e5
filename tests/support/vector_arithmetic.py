"""Norms and attention in Python, operation for operation as docs/decisions/064-one-arithmetic.md defines them."""

import numpy as np

from tests.support.one_arithmetic import F, fma

SECTION, TILE = 512, 64
POLYNOMIAL = [
    F(value) for value in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
]

LOGARITHM = [F(value) for value in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1)]
LOGARITHM += [F(value) for value in (-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)]


def exp(t: float) -> F:
    t = F(min(max(t, -87), 88))
    n = np.rint(t * F(float.fromhex("0x1.715476p+0")))
    r = fma(n, F(2.12194440e-4), fma(n, F(-0.693359375), t))
    p = F(1.9875691500e-4)
    for coefficient in POLYNOMIAL:
        p = fma(p, r, coefficient)
    return (fma(p, r * r, r) + F(1)) * F(2.0**n)


def sigmoid(z: float) -> F:
    return F(1) / (F(1) + exp(-z))


def log(x: float) -> F:
    m, exponent = np.frexp(F(x))
    if m < F(0.70710678118654752):
        m, exponent = m + m, exponent - 1
    m, e = m - F(1), F(exponent)
    z, p = m * m, F(7.0376836292e-2)
    for coefficient in LOGARITHM:
        p = fma(p, m, coefficient)
    p = fma(F(-0.5), z, fma(F(-2.12194440e-4), e, p * m * z))
    return fma(F(0.693359375), e, m + p)


def query_scale(position: int, step: float, strength: float) -> F:
    steps = np.floor(F(position + 1) / F(step))
    return F(strength) * log(steps + F(1)) + F(1)


def turn_pairs(head: np.ndarray, cos: np.ndarray, signed_sin: np.ndarray) -> np.ndarray:
    """The first dims, as many as cos has, as neighbours that turn together; sines in the order of halves."""
    half, turned = len(cos) // 2, head.copy()
    first, second = head[: 2 * half : 2], head[1 : 2 * half : 2]
    turned[: 2 * half : 2] = first * cos[:half] + second * signed_sin[:half]
    turned[1 : 2 * half : 2] = second * cos[:half] + first * signed_sin[half:]
    return turned


def add_lanes(lanes: list[F]) -> F:
    while (count := len(lanes) // 2) > 0:
        lanes = [lanes[j] + lanes[j + count] for j in range(count)]
    return lanes[0]


def add_up(values: list[F]) -> F:
    lanes = [F(0)] * 16
    for i, value in enumerate(values):
        lanes[i % 16] = lanes[i % 16] + value
    return add_lanes(lanes)


def dot(a: np.ndarray, b: np.ndarray, num_lanes: int = 16) -> F:
    lanes = [F(0)] * num_lanes
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        lanes[i % num_lanes] = fma(left, right, lanes[i % num_lanes])
    return add_lanes(lanes)


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    scale = F(1) / np.sqrt(dot(x, x) / F(len(x)) + F(epsilon))
    return x * scale * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    mean = add_up(list(x)) / F(len(x))
    return rms_norm(x - mean, weight, epsilon) + bias


def exponentials(values: list[F]) -> tuple[F, list[F], F]:
    """The greatest, the exponentials of the distances from it, and their sum."""
    greatest = max(values)
    results = [exp(value - greatest) for value in values]
    return greatest, results, add_up(results)


def softmax(values: list[F]) -> list[F]:
    _, results, total = exponentials(values)
    return [value * (F(1) / total) for value in results]


def mix(logits: list[F], ids: list[int], jitter: float) -> list[F]:
    """Weights of these experts, which a sparse mixer chooses one after another."""
    left, weights = list(logits), []
    for chosen in ids:
        best = left[chosen]
        with np.errstate(invalid="ignore"):
            far = [(best - each) / max(abs(each), best) > F(2) * F(jitter) for each in left]
        near = [F(-np.inf) if is_far else each for each, is_far in zip(left, far, strict=True)]
        weights.append(softmax(near)[chosen])
        left[chosen] = F(-np.inf)
    return weights


def attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, scaling: float, sink: float | None = None
) -> np.ndarray:
    """One head: q ``[D]``, keys and values ``[S, D]``, all fp32 -> ``[D]``."""
    sections = []
    for first in range(0, len(keys), SECTION):
        scores = [F(scaling) * dot(q, key) for key in keys[first : first + SECTION]]
        greatest, weights, total = exponentials(scores)
        weighed = np.zeros(values.shape[1], F)
        for begin in range(0, len(weights), TILE):
            weighed = weighed + _weigh(weights[begin : begin + TILE], values[first + begin :])
        sections.append((greatest, total, weighed))
    greatest = max([section[0] for section in sections] + ([] if sink is None else [F(sink)]))
    total, out = F(0), np.zeros(values.shape[1], F)
    for its_greatest, its_total, weighed in sections:
        factor = exp(its_greatest - greatest)
        total = fma(factor, its_total, total)
        out = np.array([fma(factor, new, old) for new, old in zip(weighed, out, strict=True)], F)
    if sink is not None:
        total = total + exp(F(sink) - greatest)
    return out * (F(1) / total)


def _weigh(weights: list[F], values: np.ndarray) -> np.ndarray:
    tile = np.zeros(values.shape[1], F)
    for weight, row in zip(weights, values, strict=False):
        tile = np.array([fma(weight, value, old) for value, old in zip(row, tile, strict=True)], F)
    return tile
