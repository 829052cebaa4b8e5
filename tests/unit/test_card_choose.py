"""The choice of the next token on the card, executed on the CPU: greedy as torch, draws as their definition.

The definition keeps the tokens that transformers' filters keep.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.support.cuda import shim
from tests.support.cuda.card import STRUCTS, Card, copied, fill
from tests.support.vector_arithmetic import POLYNOMIAL

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

COMPILED = [("GREATEST",), ("CHOOSE",)]
SEED = 2**63 + 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


SETTINGS = [
    Draw(),
    Draw(temperature=0.6, top_k=20, top_p=0.95),
    Draw(top_p=0.7),
    Draw(temperature=3.0, top_k=5),
    Draw(temperature=0.5, top_p=1e-8),
]


def logits_of(num_rows: int, num_tokens: int, *, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng([seed, num_tokens])
    return (4 * random.standard_normal((num_rows, num_tokens))).astype(np.float32)


def chosen(
    logits: np.ndarray,
    draw: Draw,
    position: int = 0,
    *,
    seed: int = 0,
    num_rows: int | None = None,
    stopped: Collection[str] = (),
) -> np.ndarray:
    """The tokens of the rows, which are at this position and those behind it; -7 where none is written.

    stopped: kernels that find the pass stopped.
    """
    rows, num_tokens = logits.shape
    parts = min(-(-num_tokens // 1024), 256)
    sampling = (STRUCTS["om_card_sampling"] * rows)()
    for each in sampling:
        fill(each, {"temperature": draw.temperature, "top_p": draw.top_p, "top_k": draw.top_k, "seed": SEED})
    memory, tokens = np.frombuffer(sampling, np.uint8), np.full(rows, -7, np.int32)
    params = {"logits": copied(logits), "greatest": np.zeros((rows, parts), np.uint64), "sampling": memory}
    positions = np.arange(position, position + rows, dtype=np.int32)
    params |= {"positions": positions, "tokens": tokens, "num_tokens": num_tokens}
    card = Card(COMPILED, rows if num_rows is None else num_rows, seed=seed)
    for kind, grid, y in (("GREATEST", parts, rows), ("CHOOSE", rows, 1)):
        card.stop[0] = kind in stopped
        card.run(kind, (), params, rows=[grid], y=y)
    is_written = params["greatest"].any(axis=1)
    assert is_written.tolist() == [index < card.num_rows and "GREATEST" not in stopped for index in range(rows)]
    return tokens


def test_nothing_is_written_once_the_pass_is_stopped() -> None:
    assert chosen(logits_of(1, 300), SETTINGS[0], stopped=["GREATEST", "CHOOSE"])[0] == -7


def test_greedy_takes_the_token_that_torch_takes() -> None:
    greedy = Draw(temperature=0.0, top_k=3, top_p=0.5)
    logits = logits_of(7, 2500)
    logits[1, [40, 1999]] = 90.0  # the lower of equals
    logits[2] = -np.inf
    logits[3, 2499] = np.inf
    logits[4, [77, 78]] = np.nan
    logits[5] = -0.0
    logits[5, 12] = 0.0  # equal to the others
    expected = torch.from_numpy(logits).argmax(-1).numpy()
    for seed in (0, 1, 5):
        assert np.array_equal(chosen(logits, greedy, seed=seed, num_rows=6), [*expected[:6], -7])
    assert chosen(logits[3:4], SETTINGS[1])[0] == 2499  # nothing can be drawn beside an infinity


@pytest.mark.parametrize("draw", SETTINGS)
def test_draws_are_those_of_the_definition(draw: Draw) -> None:
    logits = logits_of(2, 2500)
    logits[1, 3:9] = logits[1].max()  # several of the greatest
    for position in range(6):
        expected = [drawn(row, draw, position + index) for index, row in enumerate(logits)]
        assert np.array_equal(chosen(logits, draw, position, seed=position), expected)


@pytest.mark.parametrize("draw", SETTINGS)
def test_the_definition_keeps_what_transformers_keeps(draw: Draw) -> None:
    for seed in range(5):
        logits = logits_of(1, 400, seed=seed)
        scores = torch.from_numpy(logits)
        warpers = [TemperatureLogitsWarper(draw.temperature)]
        warpers += [TopKLogitsWarper(draw.top_k)] if draw.top_k else []
        warpers += [TopPLogitsWarper(draw.top_p)] if draw.top_p < 1 else []
        for warper in warpers:
            scores = warper(None, scores)
        expected = scores.softmax(-1)[0].double().numpy()
        masses = kept(logits[0], draw)
        assert np.abs(masses / masses.sum() - expected).max() < 1e-6
        assert (expected[masses > 0] > 0).all()
        assert (masses[expected > 2e-9 * expected.max()] > 0).all()


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32))
    tokens = [drawn(logits[0], Draw(), position) for position in range(2000)]
    counts = np.bincount(tokens, minlength=4) / 2000
    assert np.abs(counts - [0.5, 0.25, 0.125, 0.125]).max() < 0.04
    for position in range(20):
        assert chosen(logits, Draw(), position)[0] == tokens[position]


def test_tokens_far_below_the_greatest_are_drawn_too() -> None:
    logits = np.full((1, 2500), -11.0, np.float32)
    logits[0, 1200] = 0.0
    position = next(n for n in range(400) if drawn(logits[0], Draw(), n) != 1200)
    assert chosen(logits, Draw(), position)[0] == drawn(logits[0], Draw(), position)


def test_tokens_too_far_below_the_greatest_are_not_drawn() -> None:
    """Their probabilities are rounded to none, but those of many together would decide this draw."""
    logits, position = np.full((1, 65536), -21.0, np.float32), 69096
    logits[0, 0] = 0.0
    assert random_bits(position) * (2**30 + 65535) >> 64 >= 2**30
    assert chosen(logits, Draw(), position)[0] == drawn(logits[0], Draw(), position) == 0


def kept(logits: np.ndarray, draw: Draw) -> np.ndarray:
    """The masses of tokens ``[V]``, 0 of those that are left out."""
    t = (logits - logits.max()) * (np.float32(1) / np.float32(draw.temperature))
    is_drawn = t >= np.float32(-20.796875)
    depths = np.where(is_drawn, (-t.clip(-21) * np.float32(2**26)).astype(np.int64), 2**32)
    masses = np.where(is_drawn, np.rint(exponentials(t.clip(-21)) * np.float32(2**30)), 0).astype(np.int64)
    if draw.top_k:
        deepest = np.sort(depths[is_drawn])[: draw.top_k][-1]
        masses[depths > deepest] = 0
    if draw.top_p < 1:
        share = int(np.rint(np.float32(draw.top_p) * np.float32(2**24)))
        target = max(1, int(masses.sum()) * share >> 24)
        order = np.argsort(depths, kind="stable")
        deepest = depths[order][np.searchsorted(masses[order].cumsum(), target)]
        masses[depths > deepest] = 0
    return masses


def exponentials(t: np.ndarray) -> np.ndarray:
    """As `vector_arithmetic.exp`, of all; an fma by way of fp64 may round twice: a mass is then off by 2^-24 of it."""
    n = np.rint(t * np.float32(float.fromhex("0x1.715476p+0")))
    r = _fma(n, np.float32(2.12194440e-4), _fma(n, np.float32(-0.693359375), t))
    p = np.full_like(t, 1.9875691500e-4)
    for coefficient in POLYNOMIAL:
        p = _fma(p, r, coefficient)
    return (_fma(p, r * r, r) + np.float32(1)) * np.float32(2) ** n


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def drawn(logits: np.ndarray, draw: Draw, position: int) -> int:
    masses = kept(logits, draw)
    target = (random_bits(position) * int(masses.sum()) >> 64) + 1
    return int(np.searchsorted(masses.cumsum(), target))


def random_bits(position: int) -> int:
    words = philox([position, 0, 0, 0], [SEED % 2**32, SEED >> 32])
    return words[1] << 32 | words[0]


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10."""
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second % 2**32, first >> 32 ^ counter[3] ^ key[1], first % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def test_random_bits_are_philox() -> None:
    """Known answers of its authors (Random123, kat_vectors)."""
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([2**32 - 1] * 4, [2**32 - 1] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_a_token_depends_on_no_other_row_of_its_pass() -> None:
    logits = logits_of(1, 300).repeat(4, 0)
    together = chosen(logits, Draw(), 20)
    assert together.tolist() == [chosen(logits[:1], Draw(), 20 + row)[0] for row in range(4)]
    assert len(set(together.tolist())) > 1
