"""The card's norms, inputs and sums, executed on the CPU: the library's bits."""

import numpy as np
import pytest
import torch

from offload_moe.native import kernels
from tests.support.cuda import shim
from tests.support.cuda.card import Card, bits, copied
from tests.support.cuda.layer import CardExperts, Family, choose, library_rows
from tests.support.cuda.matrices import extreme_rows, make_records, random_rows
from tests.support.gguf_records import decoded as gguf_numbers
from tests.support.gguf_records import random_rows as random_blocks
from tests.support.one_arithmetic import quantize

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

EPSILON = 1e-6
LAYER = Family(codec="nf4", hidden=200, intermediate=48, top_k=3, compiled=2)
COMPILED = [
    ("NORM", 200),
    ("NORM", 64),
    ("QUANTIZE", 200),
    *LAYER.kernels(),
    ("EMBED", "OM_BF16", 200),
    ("EMBED", "OM_FP32", 64),
    *(("EMBED", f"OM_{kind}", 512) for kind in ("Q8_0", "Q4_K", "Q6_K")),
]
COMPILED += [("MLP_FIRST", "OM_INT8", "OM_INT8", 200, 72, 2, "OM_SILU"), ("MLP_SECOND", "OM_INT8", 72, 200, 2)]
COMPILED = list(dict.fromkeys(COMPILED))


def norm_of(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    out = torch.empty(x.shape)
    kernel = kernels.NormKernel(torch.from_numpy(weight), EPSILON, None if bias is None else torch.from_numpy(bias))
    for row, result in zip(torch.from_numpy(x), out, strict=True):
        kernel.step(row.contiguous(), result)
    return out.numpy()


@pytest.mark.parametrize("hidden", [64, 200])
def test_norms_and_their_inputs(hidden: int) -> None:
    weight = random_rows(1, hidden)[0]
    for x in (random_rows(3, hidden), extreme_rows(8, hidden)):
        num_rows, expected = len(x), norm_of(x, weight)
        for seed in (0, 1, 5):
            card = Card(COMPILED, num_rows, seed=seed)
            normed = np.full((num_rows + 1, hidden), 5.0, np.float32)
            inputs = [card.input(codec, hidden, num_rows + 1) for codec in ("nf4", "int8", "mxfp4")]
            params = {"x": copied(x), "weight": copied(weight), "epsilon": EPSILON, "normed": normed, "inputs": inputs}
            card.run("NORM", (hidden,), params, rows=[num_rows + 1])
            assert np.array_equal(bits(normed[:num_rows]), bits(expected))
            assert (normed[num_rows:] == 5.0).all()
            check_inputs(inputs, expected)


@pytest.mark.parametrize("hidden", [64, 200])
def test_layer_norms(hidden: int) -> None:
    weight, bias = random_rows(2, hidden, seed=5)
    for x in (random_rows(3, hidden) + np.float32(3), extreme_rows(8, hidden)):
        num_rows, expected = len(x), norm_of(x, weight, bias)
        for seed in (0, 1, 5):
            card, normed = Card(COMPILED, num_rows, seed=seed), np.empty((num_rows, hidden), np.float32)
            inputs = [card.input(codec, hidden, num_rows) for codec in ("nf4", "int8", "mxfp4")]
            params = {"x": copied(x), "weight": copied(weight), "bias": copied(bias), "epsilon": EPSILON}
            card.run("NORM", (hidden,), {**params, "normed": normed, "inputs": inputs}, rows=[num_rows])
            assert np.array_equal(bits(normed), bits(expected))
            check_inputs(inputs, expected)


def check_inputs(inputs: list[dict[str, np.ndarray]], normed: np.ndarray) -> None:
    """The quants that the definition gives, in the order of each codec."""
    num_rows, hidden = normed.shape
    padded = np.zeros((num_rows, -(-hidden // 64) * 64), np.float32)
    padded[:, :hidden] = normed
    for codec, taken in zip(("nf4", "int8", "mxfp4"), inputs, strict=True):
        pairs = [quantize(row, 32 if codec == "mxfp4" else 64) for row in padded]
        quants = np.stack([q.reshape(-1, 2) for q, _ in pairs])
        if codec == "nf4":
            quants = quants[..., ::-1]
        scales = np.stack([s for _, s in pairs])
        assert np.array_equal(taken["quants"][: quants.size], quants.reshape(-1))
        assert (taken["quants"][quants.size :] == 77).all()
        assert np.array_equal(bits(taken["scales"][: scales.size]), bits(scales.reshape(-1)))


@pytest.mark.parametrize("from_zero", [False, True])
def test_sums_are_added_in_their_order(from_zero: bool) -> None:
    x, parts, scale = random_rows(2, 64), random_rows(6, 64).reshape(2, 3, 64), np.float32(0.22)
    x[0, 0] = parts[0, :, 0] = -0.0
    for count in (1, 3):
        added = np.zeros((2, 64), np.float32) if from_zero else parts[:, 0].copy()
        for place in range(0 if from_zero else 1, count):
            added = added + parts[:, place]
        expected = x + scale * added
        params = {"x": copied(x), "added": copied(parts[:, :count]), "num_added": count, "scale": float(scale)}
        total = np.empty_like(x)
        Card(COMPILED, 2).run("NORM", (64,), {**params, "sum": total, "from_zero": int(from_zero)}, rows=[2])
        assert np.array_equal(bits(total), bits(expected))
        assert np.signbit(total[0, 0]) == (not from_zero)


def test_a_layer_of_experts_has_the_librarys_bits() -> None:
    """From the residual to the next norm: norm, input, experts, shared expert, its gate, sums, norm."""
    family, scale = LAYER, np.float32(0.5)
    hidden, num_rows = family.hidden, 2
    records, choice = family.records(), choose(family, num_rows)
    x, attended, weight, gate = (random_rows(2, hidden, seed=n) for n in range(4))
    weight, gate = weight[0], gate[0]
    shared = [
        make_records("int8", [("weight", *dims)], seed=n)
        for n, dims in enumerate([(72, hidden), (72, hidden), (hidden, 72)])
    ]
    linears = [
        kernels.Linear(codec=r.codec, shape=r.shape, layout=r.layout, record=r.tensors[0], in_panels=True)
        for r in shared
    ]
    residual = x + scale * attended
    normed = norm_of(residual, weight)
    mixed = torch.from_numpy(library_rows(family, records, normed, choice))
    kernels.SharedKernel(kernels.MlpKernel(*linears, activation="silu"), torch.from_numpy(gate)).add(
        torch.from_numpy(normed), mixed
    )
    expected = residual + scale * mixed.numpy()

    layer = CardExperts(family, records, COMPILED, num_rows, 3)
    card = layer.card
    parts = np.full((2, family.top_k + 1, hidden), np.nan, np.float32)
    taken, between = card.input("int8", hidden, 2), card.input("int8", 72, 2)
    sums, own_norm, shares = np.empty_like(x), np.empty_like(x), np.empty(2, np.float32)
    params = {"x": copied(x), "added": copied(attended), "num_added": 1, "scale": float(scale), "epsilon": EPSILON}
    params |= {"weight": copied(weight), "gate": copied(gate), "sum": sums, "normed": own_norm, "shares": shares}
    card.run("NORM", (hidden,), {**params, "inputs": [layer.input, taken]}, rows=[2])
    assert np.array_equal(bits(own_norm), bits(normed))
    layer.pairs = parts
    layer.compute(choice, layer.addresses(choice), stride=family.top_k + 1)
    first = {
        "input": taken,
        "matrices": [r.matrix(0) for r in shared[:2]],
        "records": [r.memory[0] for r in shared[:2]],
    }
    card.run("MLP_FIRST", ("OM_INT8", "OM_INT8", hidden, 72, 2, "OM_SILU"), {**first, "hidden": between})
    second = {"hidden": between, "matrix": shared[2].matrix(0), "record": shared[2].memory[0], "shares": shares}
    second |= {"out": parts.ctypes.data + 4 * hidden * family.top_k, "stride": family.top_k + 1}
    card.run("MLP_SECOND", ("OM_INT8", 72, hidden, 2), second)
    params = {
        "x": sums,
        "sum": sums,
        "added": parts,
        "num_added": family.top_k + 1,
        "from_zero": 1,
        "scale": float(scale),
    }
    card.run("NORM", (hidden,), params, rows=[2])
    assert np.array_equal(bits(sums), bits(expected))


@pytest.mark.parametrize(("dtype", "hidden"), [(torch.bfloat16, 200), (torch.float32, 64)])
def test_embeddings(dtype: torch.dtype, hidden: int) -> None:
    table = torch.from_numpy(random_rows(9, hidden)).to(dtype)
    codec = "OM_BF16" if dtype == torch.bfloat16 else "OM_FP32"
    x = np.full((5, hidden), 5.0, np.float32)
    tokens = np.array([8, 0, 9, -1, 1], np.int32)
    params = {"tokens": tokens, "table": table, "x": x, "scale": 1.5, "num_tokens": 9}
    card = Card(COMPILED, 4, seed=5)
    card.stop[0] = 1
    card.run("EMBED", (codec, hidden), params, y=5)
    assert (x == 5.0).all()
    card.stop[0] = 0
    card.run("EMBED", (codec, hidden), params, y=5)
    assert np.array_equal(x[:2], (table.float() * 1.5)[[8, 0]].numpy())
    assert np.isnan(x[2:4]).all()  # no such tokens
    assert (x[4] == 5.0).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_embeddings_in_types_of_gguf(kind: str) -> None:
    blocks = random_blocks(kind, 9, 512)
    x, tokens = np.full((2, 512), 5.0, np.float32), np.array([8, 3], np.int32)
    params = {"tokens": tokens, "table": copied(blocks), "x": x, "scale": 1.5, "num_tokens": 9}
    Card(COMPILED, 2).run("EMBED", (f"OM_{kind}", 512), params, y=2)
    assert np.array_equal(bits(x), bits(gguf_numbers(kind, blocks[tokens]).astype(np.float32) * np.float32(1.5)))


def test_nothing_is_written_once_the_pass_is_stopped() -> None:
    card, x, written = Card(COMPILED, 1), random_rows(1, 64), np.full(64, 5.0, np.float32)
    card.stop[0] = 1
    inputs = [card.input(codec, 64, 1) for codec in ("nf4", "int8", "mxfp4")]
    shares = written[:1].copy()
    params = {
        "x": copied(x),
        "weight": copied(x),
        "gate": copied(x),
        "normed": written,
        "sum": written,
        "shares": shares,
    }
    card.run("NORM", (64,), {**params, "inputs": inputs})
    assert (written == 5.0).all()
    assert (shares == 5.0).all()
    assert all((taken["quants"] == 77).all() for taken in inputs)
