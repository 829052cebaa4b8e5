"""The card's experts, executed on the CPU: the library's bits for layers of the families in small, for 1 to 8 rows."""

from typing import Any

import numpy as np
import pytest
import torch

from offload_moe.native import kernels
from tests.support.cuda import shim
from tests.support.cuda.card import Card, bits, codec_name, copied
from tests.support.cuda.layer import CardExperts, Choice, Family, choose, library_rows
from tests.support.cuda.matrices import Records, extreme_rows, make_records, random_rows, spoil_scales

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

FAMILIES = {
    "qwen3": Family(codec="nf4", hidden=128, intermediate=48, top_k=4),
    "qwen3, 8 rows": Family(codec="nf4", hidden=128, intermediate=48, top_k=4, compiled=8),
    # up rows begin inside a word of scales, and nested scales change inside panels
    "deepseek": Family(codec="nf4", hidden=320, intermediate=87, top_k=3, compiled=2),
    "mixtral": Family(codec="int8", hidden=192, intermediate=224, top_k=2, compiled=4),
    "olmoe": Family(codec="int8", hidden=136, intermediate=50, top_k=4, activation="gelu"),
    "gpt-oss": Family(
        codec="mxfp4", hidden=96, intermediate=96, top_k=3, activation="gpt_oss", has_bias=True, compiled=4
    ),
    "llama4": Family(codec="nf4", hidden=264, intermediate=48, top_k=2, compiled=4, are_scaled=True),
    "Q4_K_M": Family(codec="gguf:Q4_K,Q4_K,Q6_K", hidden=256, intermediate=256, top_k=2),
    # more superblocks than are multiplied at a time
    "Q4_K and Q8_0": Family(
        codec="gguf:Q4_K,Q4_K,Q8_0",
        hidden=2304,
        intermediate=64,
        top_k=2,
        num_experts=3,
        has_bias=True,
        compiled=4,
    ),
    "without gates": Family(codec="mxfp4", hidden=160, intermediate=72, top_k=2, activation="relu2", has_gate=False),
}
MLP = ("nf4", "int8", 200, 104, 2)  # codecs of gate and up, and of down; hidden, intermediate, compiled rows
COMPILED: list[tuple[Any, ...]] = sorted({kernel for family in FAMILIES.values() for kernel in family.kernels()})
COMPILED += [
    ("QUANTIZE", MLP[2]),
    ("MLP_FIRST", "OM_NF4", "OM_INT8", MLP[2], MLP[3], MLP[4], "OM_GELU_TANH"),
    ("MLP_SECOND", "OM_INT8", MLP[3], MLP[2], MLP[4]),
]


def run(family: Family, records: Records, x: np.ndarray, choice: Choice, seed: int = 0) -> np.ndarray:
    layer = CardExperts(family, records, COMPILED, len(x), seed)
    layer.scale(x, choice) if family.are_scaled else layer.quantize(x)
    quants = layer.input["quants"].reshape(family.compiled, -1)
    assert (quants[len(x) :] == 77).all()
    layer.compute(choice, layer.addresses(choice))
    assert (layer.pairs[len(x) :] == 5.0).all()
    return layer.sums()


@pytest.mark.parametrize("name", FAMILIES)
def test_bits_are_the_librarys(name: str) -> None:
    family = FAMILIES[name]
    records = family.records()
    for num_rows in sorted({1, family.compiled - 1, family.compiled} - {0}):
        x, choice = random_rows(num_rows, family.hidden), choose(family, num_rows)
        expected = library_rows(family, records, x, choice)
        assert np.abs(expected).max() > 0.01
        for seed in (0, 1, 5):
            assert np.array_equal(bits(run(family, records, x, choice, seed)), bits(expected))


def test_all_rows_may_choose_the_same_experts() -> None:
    family = FAMILIES["qwen3, 8 rows"]
    records, x = family.records(), random_rows(7, family.hidden)
    ids = np.array([[3, 1, 0, 5]] * 7, np.int32)
    choice = Choice(ids=ids, weights=np.full(ids.shape, 0.25, np.float32))
    assert np.array_equal(bits(run(family, records, x, choice)), bits(library_rows(family, records, x, choice)))


@pytest.mark.parametrize("name", ["deepseek", "mixtral", "gpt-oss", "llama4", "Q4_K and Q8_0"])
def test_extreme_groups_and_scales(name: str) -> None:
    family = FAMILIES[name]
    records = family.records()
    records.memory[:] = [memory.copy() for memory in records.memory]
    x, choice = extreme_rows(family.compiled, family.hidden), choose(family, family.compiled)
    plain = library_rows(family, records, x, choice)
    assert np.array_equal(bits(run(family, records, x, choice)), bits(plain))
    for matrix in ("gate_up_proj", "down_proj"):
        spoil_scales(records, matrix)
    spoiled = library_rows(family, records, x, choice)
    assert np.isnan(spoiled).sum() > np.isnan(plain).sum()
    assert np.array_equal(bits(run(family, records, x, choice)), bits(spoiled))


@pytest.mark.parametrize("name", ["qwen3", "olmoe"])
def test_gates_behind_the_ends_of_what_is_computed(name: str) -> None:
    """Of the exponential, and of the normal distribution: most gates are beyond 100."""
    family = FAMILIES[name]
    records, x, choice = family.records(), random_rows(1, family.hidden) * np.float32(1000), choose(family, 1)
    expected = library_rows(family, records, x, choice)
    assert np.isfinite(expected).all()
    assert np.array_equal(bits(run(family, records, x, choice)), bits(expected))


def test_tiny_and_infinite_groups_have_no_quants() -> None:
    """In a sum with other groups a tiny one is lost, so quants and scales are compared themselves."""
    family = FAMILIES["qwen3, 8 rows"]
    layer, x = CardExperts(family, family.records(), COMPILED, 8, 0), extreme_rows(8, family.hidden)
    layer.quantize(x)
    quants, scales = layer.input["quants"].reshape(8, -1, 64)[:, 1], layer.input["scales"].reshape(8, -1)[:, 1]
    is_usable = np.isfinite(x[:, 64]) & (np.abs(x[:, 64]) >= 2.0**-100)
    assert np.array_equal((quants != 0).all(axis=1), is_usable)
    assert np.array_equal(np.isnan(scales), ~np.isfinite(x[:, 64]))
    assert np.array_equal(scales > 0, is_usable)


@pytest.mark.parametrize("name", ["qwen3", "qwen3, 8 rows"])
def test_missing_experts_are_left_out_and_computed_by_another_launch(name: str) -> None:
    family = FAMILIES[name]
    num_rows = family.compiled
    records, x, choice = family.records(), random_rows(num_rows, family.hidden), choose(family, num_rows)
    present = choice.ids % 2 == 0
    assert 0 < present.sum() < present.size
    layer = CardExperts(family, records, COMPILED, num_rows, 0)
    layer.quantize(x)
    layer.compute(choice, layer.addresses(choice, present))
    ranks = np.argsort(np.argsort(choice.ids, axis=1), axis=1)
    for row, place in np.argwhere(~present):
        assert (layer.pairs[row, ranks[row, place]] == 5.0).all()
    layer.compute(choice, layer.addresses(choice, ~present))
    assert np.array_equal(bits(layer.sums()), bits(library_rows(family, records, x, choice)))


def test_no_input_is_scaled_once_the_pass_is_stopped_or_behind_the_last_row() -> None:
    family = FAMILIES["llama4"]
    x, choice = random_rows(3, family.hidden), choose(family, 3)
    layer = CardExperts(family, family.records(), COMPILED, 3, 0)
    layer.card.stop[0] = 1
    layer.scale(x, choice)
    assert (layer.input["quants"] == 77).all()
    layer.card.stop[0] = 0
    layer.scale(x, choice)
    quants = layer.input["quants"].reshape(family.compiled * family.top_k, -1)
    assert (quants[3 * family.top_k :] == 77).all()
    assert not (quants[: 3 * family.top_k] == 77).all(axis=1).any()


def test_nothing_is_written_once_the_pass_is_stopped() -> None:
    family = FAMILIES["qwen3"]
    records, choice = family.records(), choose(family, 1)
    layer = CardExperts(family, records, COMPILED, 1, 0)
    layer.quantize(random_rows(1, family.hidden))
    layer.card.stop[0] = 1
    layer.compute(choice, layer.addresses(choice))
    assert (layer.hidden["quants"] == 77).all()
    assert (layer.pairs == 5.0).all()


def test_no_gated_mlp_is_computed_once_the_pass_is_stopped() -> None:
    codec, last, hidden, intermediate, compiled = MLP
    card = Card(COMPILED, 1)
    card.stop[0] = 1
    records = [
        make_records(c, [("weight", *dims)])
        for c, dims in ((codec, (intermediate, hidden)), (last, (hidden, intermediate)))
    ]
    taken, between = card.input(codec, hidden, compiled), card.input(last, intermediate, compiled)
    sizes = (codec_name(codec), codec_name(last), hidden, intermediate, compiled, "OM_GELU_TANH")
    places = {"matrices": [records[0].matrix(0)] * 2, "records": records[0].memory * 2}
    card.run("MLP_FIRST", sizes, {"input": taken, **places, "hidden": between})
    out = np.full((compiled, hidden), 5.0, np.float32)
    params = {
        "hidden": between,
        "matrix": records[1].matrix(0),
        "record": records[1].memory[0],
        "out": out,
        "stride": 1,
    }
    card.run("MLP_SECOND", (codec_name(last), intermediate, hidden, compiled), params)
    assert (between["quants"] == 77).all()
    assert (out == 5.0).all()


@pytest.mark.parametrize("has_shares", [False, True])
def test_shared_experts(has_shares: bool) -> None:
    codec, last, hidden, intermediate, compiled = MLP
    sizes = [(codec, intermediate, hidden), (codec, intermediate, hidden), (last, hidden, intermediate)]
    records = [make_records(c, [("weight", rows, cols)], seed=n) for n, (c, rows, cols) in enumerate(sizes)]
    linears = [
        kernels.Linear(codec=r.codec, shape=r.shape, layout=r.layout, record=r.tensors[0], in_panels=True)
        for r in records
    ]
    mlp, x = kernels.MlpKernel(*linears, activation="gelu_tanh"), random_rows(compiled, hidden)
    shares = random_rows(1, compiled)[0] if has_shares else None
    for num_rows in (1, compiled):
        expected = torch.empty(num_rows, hidden)
        mlp.forward(torch.from_numpy(x[:num_rows]), expected)
        scaled = expected.numpy() * (shares[:num_rows, None] if shares is not None else np.float32(1))
        for seed in (0, 1, 5):
            out = run_mlp(records, x, num_rows, shares, seed)
            assert np.array_equal(bits(out[:num_rows, 1]), bits(scaled))
            assert (out[:, 0] == 5.0).all()
            assert (out[num_rows:] == 5.0).all()


def run_mlp(records: list[Records], x: np.ndarray, num_rows: int, shares: np.ndarray | None, seed: int) -> np.ndarray:
    """``[R, 2, H]``, of which the second part is set."""
    codec, last, hidden, intermediate, compiled = MLP
    card = Card(COMPILED, num_rows, seed=seed)
    taken, between = card.input(codec, hidden, compiled), card.input(last, intermediate, compiled)
    card.run("QUANTIZE", (hidden,), {"x": copied(x), "inputs": [taken]}, y=compiled)
    first = {
        "input": taken,
        "matrices": [r.matrix(0) for r in records[:2]],
        "records": [r.memory[0] for r in records[:2]],
    }
    sizes = (codec_name(codec), codec_name(last), hidden, intermediate, compiled, "OM_GELU_TANH")
    card.run("MLP_FIRST", sizes, {**first, "hidden": between})
    out = np.full((compiled, 2, hidden), 5.0, np.float32)
    second = {"hidden": between, "matrix": records[2].matrix(0), "record": records[2].memory[0], "shares": shares}
    second |= {"out": out.ctypes.data + 4 * hidden, "stride": 2}
    card.run("MLP_SECOND", (codec_name(last), intermediate, hidden, compiled), second)
    return out
