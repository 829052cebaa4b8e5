"""The card's kernels, executed on the CPU: the library's bits for random sizes, rows and orders of threads."""

import numpy as np
import pytest

from tests.support.cuda import shim
from tests.support.cuda.card import Card, bits, codec_name
from tests.support.cuda.layer import CardExperts, Family, choose, library_rows
from tests.support.cuda.linears import expected_of, make_matrices, multiply
from tests.support.cuda.matrices import extreme_rows, random_rows, spoil_scales

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")]

CODECS = ("nf4", "int8", "mxfp4")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "gpt_oss", "relu", "relu2", "identity")


@pytest.mark.parametrize("seed", range(16))
def test_linears(seed: int) -> None:
    random = np.random.default_rng(seed)
    codec, compiled = CODECS[seed % 3], int(random.choice([1, 2, 4, 8]))
    cols = int(random.choice([random.integers(1, 200), random.integers(200, 1500), random.integers(4000, 6500)]))
    rows = tuple(int(count) for count in random.integers(1, 120 if cols < 1500 else 40, random.integers(1, 5)))
    wanted = [("QUANTIZE", cols), ("LINEAR", codec_name(codec), cols, compiled)]
    records, biases = make_matrices(codec, rows, cols)
    for make in (random_rows, extreme_rows):
        num_rows = int(random.integers(1, compiled + 1))
        x = make(num_rows, cols)
        expected = expected_of(records, x, biases)
        for order in (0, 1, int(random.integers(2, 1000))):
            outs = multiply(Card(wanted, num_rows, seed=order), records, x, compiled, biases)
            for out, values in zip(outs, expected, strict=True):
                assert np.array_equal(bits(out[:num_rows]), bits(values))
        for each in records:
            spoil_scales(each, "weight")


@pytest.mark.parametrize("seed", range(16))
def test_experts(seed: int) -> None:
    random = np.random.default_rng(100 + seed)
    family = Family(
        codec=CODECS[seed % 3],
        hidden=int(random.integers(1, 700)),
        intermediate=int(random.choice([random.integers(1, 300), 16 * random.integers(1, 20)])),
        top_k=int(random.integers(1, 6)),
        activation=ACTIVATIONS[seed % 7],
        has_gate=ACTIVATIONS[seed % 7] == "gpt_oss" or bool(random.integers(0, 2)),
        has_bias=bool(random.integers(0, 2)),
        compiled=int(random.choice([1, 2, 4, 8])),
    )
    records = family.records()
    for num_rows in sorted({1, family.compiled}):
        x, choice = random_rows(num_rows, family.hidden), choose(family, num_rows, seed=seed)
        expected = library_rows(family, records, x, choice)
        for order in (0, 1, int(random.integers(2, 1000))):
            layer = CardExperts(family, records, family.kernels(), num_rows, order)
            layer.quantize(x)
            layer.compute(choice, layer.addresses(choice))
            assert np.array_equal(bits(layer.sums()), bits(expected))
