"""The kernels that decide residency, executed on the CPU: several rows, both modes, bounds and stopped passes."""

import numpy as np
import pytest

from offload_moe.card.structs import constant, struct
from tests.support.cuda import shim
from tests.support.cuda.residency import (
    EMPTY,
    FIRST_KEY,
    HEAD,
    HIDDEN,
    HIT,
    HOSTS,
    LAYER,
    MISSED,
    NUM_LAYERS,
    RECORD_BYTES,
    TOP_K,
    Layer,
    build,
    is_junk,
    junk,
)

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

IDS, DISTINCT = [[0, 1, 2, 3], [3, 1, 0, 4]], 5
IS_HERE = np.array([0, 1, 0, 1, 1, 1, 0, 0], bool)  # experts 1 and 3
PAIRS = 2 * TOP_K  # of the rows that there are
ROWS = 3  # that memory is for
TOKEN = 5
NOW = TOKEN * NUM_LAYERS + LAYER + 1


@pytest.fixture(scope="module")
def library() -> shim.ShimLibrary:
    return build()


def two_rows(library: shim.ShimLibrary, seed: int = 0, *, is_stepwise: bool = False) -> Layer:
    """Two of three rows. Experts 1 and 3 are here; of the device's other slots one has become empty of late."""
    key_of = [FIRST_KEY + 1, 5, HOSTS, EMPTY, FIRST_KEY + 3, 2]
    layer = Layer(library, key_of, [3, 8, 0, NOW - 1, 4, 2], token=TOKEN, ids=IDS, max_rows=ROWS, seed=seed)
    layer.state.mode = constant("OM_CARD_STEPWISE") if is_stepwise else constant("OM_CARD_QUEUED")
    layer.worth[[5, 2]] = 7
    assert layer.state.num_owned == DISTINCT
    return layer


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_missing_experts_of_two_rows_get_slots_and_their_records(library: shim.ShimLibrary, seed: int) -> None:
    layer = two_rows(library, seed)
    layer.resolve()
    slots = np.where(IS_HERE, layer.slot_of[FIRST_KEY + layer.ids.reshape(-1)], 0)
    here = np.where(IS_HERE, layer.memory[slots], 0)
    assert layer.hits.tolist() == [*here, *[0] * (len(layer.hits) - PAIRS)]
    assert layer.used.tolist() == [NOW, 8, 0, NOW - 1, NOW, 2]
    layer.admit()
    assert layer.changes == [[3, EMPTY, FIRST_KEY], [5, 2, FIRST_KEY + 2], [1, 5, FIRST_KEY + 4]]
    assert layer.key_of.tolist() == [FIRST_KEY + 1, FIRST_KEY + 4, HOSTS, FIRST_KEY, FIRST_KEY + 3, FIRST_KEY + 2]
    assert layer.used.tolist() == [NOW, NOW, 0, NOW, NOW, NOW]
    assert layer.slot_of.tolist() == [*[-1] * FIRST_KEY, 3, 0, 5, 4, 1, -1, -1, -1]
    fetched = np.where(IS_HERE, 0, layer.memory[layer.slot_of[FIRST_KEY + layer.ids.reshape(-1)]])
    assert layer.fetched.tolist() == [*fetched, *[0] * (len(layer.fetched) - PAIRS)]
    check_log(layer)
    assert is_junk(layer.notice)
    assert is_junk(layer.host_normed)
    layer.fetch()
    for slot, record in ((3, 0), (5, 2), (1, 4)):
        assert np.array_equal(layer.slots[slot, :RECORD_BYTES], layer.records[FIRST_KEY + record])
    assert is_junk(layer.slots[:, RECORD_BYTES:])
    assert is_junk(layer.slots[[0, 2, 4]])
    layer.resolve()
    assert len(layer.changes) == 3  # a layer that is resolved again keeps them


def check_log(layer: Layer) -> None:
    most = ROWS * TOP_K
    assert layer.log[0] == TOKEN
    ids, weights, found = layer.log[HEAD : HEAD + 3 * most].reshape(3, most)
    assert ids.tolist() == [*layer.ids.reshape(-1), *[-1] * TOP_K]
    assert np.array_equal(weights[:PAIRS].view(np.float32), layer.weights)
    assert found.tolist() == [*np.where(IS_HERE, HIT, MISSED), *[-1] * TOP_K]
    assert (layer.log[HEAD + 3 * most + 3 * len(layer.changes) :] == -1).all()


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_stepwise_the_host_gets_what_it_computes(library: shim.ShimLibrary, seed: int) -> None:
    layer = two_rows(library, seed, is_stepwise=True)
    layer.source[:], layer.state.num_owned = 0, 1  # nothing is fetched
    layer.resolve()
    assert layer.state.stop == layer.noticed("stop") == 0
    assert (layer.noticed("layer"), layer.noticed("stamp")) == (LAYER, NOW)
    assert np.array_equal(layer.noticed("ids")[:PAIRS], layer.ids.reshape(-1))
    assert np.array_equal(layer.noticed("found")[:PAIRS], np.where(IS_HERE, HIT, MISSED))
    assert np.array_equal(layer.noticed("weights")[:PAIRS], layer.weights)
    assert all(is_junk(layer.noticed(name)[PAIRS:]) for name in ("ids", "found", "weights"))
    assert np.array_equal(layer.host_normed, layer.normed)


@pytest.mark.parametrize("mode", ["STEPWISE", "QUEUED"])
def test_experts_that_are_all_here_need_no_host_and_no_slot(library: shim.ShimLibrary, mode: str) -> None:
    keys = [FIRST_KEY + expert for expert in range(DISTINCT)]
    layer = Layer(library, [*keys, HOSTS], [0] * 6, token=TOKEN, ids=IDS, max_rows=ROWS)
    layer.state.mode, layer.state.num_owned = constant(f"OM_CARD_{mode}"), 0
    layer.resolve()
    assert layer.state.stop == 0
    assert layer.noticed("stamp") == NOW if mode == "STEPWISE" else is_junk(layer.notice)
    assert is_junk(layer.host_normed)


def test_more_experts_than_slots_stop_the_pass(library: shim.ShimLibrary) -> None:
    layer = two_rows(library)
    layer.state.num_owned = DISTINCT - 1
    layer.resolve()
    assert layer.state.stop == layer.noticed("stop") == constant("OM_STOP_SLOTS")
    assert (layer.noticed("layer"), layer.noticed("stamp")) == (LAYER, NOW)
    assert np.array_equal(layer.noticed("ids")[:PAIRS], layer.ids.reshape(-1))
    assert layer.used.tolist() == [3, 8, 0, NOW - 1, 4, 2]
    assert is_junk(layer.host_normed)


def test_experts_that_are_here_need_no_source(library: shim.ShimLibrary) -> None:
    layer = two_rows(library)
    layer.source[[FIRST_KEY + 1, FIRST_KEY + 3]] = 0
    layer.resolve()
    assert layer.state.stop == 0
    layer.source[FIRST_KEY + 2] = 0
    layer.resolve()
    assert layer.state.stop == constant("OM_STOP_MISSING")


def test_rows_of_the_host_come_to_their_places(library: shim.ShimLibrary) -> None:
    layer, stride = two_rows(library, is_stepwise=True), TOP_K + 1
    layer.resolve()
    host_pairs = np.random.default_rng(2).random((2, stride, HIDDEN), np.float32)
    pairs = junk(2, stride, HIDDEN, dtype=np.float32)
    places = {"host_pairs": host_pairs.ctypes.data, "pairs": pairs.ctypes.data, "stride": stride}
    layer.run("take", blocks=(ROWS * TOP_K,), threads=128, **places)
    for row, ids in enumerate(IDS):
        for place in range(stride):
            is_taken = place < TOP_K and sorted(ids)[place] not in (1, 3)
            assert np.array_equal(pairs[row, place], host_pairs[row, place]) if is_taken else is_junk(pairs[row, place])


def test_the_end_of_a_pass_moves_its_rows_on(library: shim.ShimLibrary) -> None:
    layer = two_rows(library)
    state = layer.state
    for row in range(len(state.positions)):
        state.positions[row], state.advance[row], state.tokens[row] = 10 + row, 1 + row, 100 + row
    layer.run("finish", threads=32)
    assert list(state.positions) == [11, 13, *range(12, 10 + len(state.positions))]
    assert layer.noticed("tokens")[:2].tolist() == [100, 101]
    assert is_junk(layer.noticed("tokens")[2:])
    assert (state.token, layer.noticed("done")) == (TOKEN + 1, TOKEN)


def test_edits_behind_the_last_one_change_nothing(library: shim.ShimLibrary) -> None:
    """More than a thread block has, one for each key of a table."""
    count, kind = 300, np.dtype([("kind", np.int32), ("index", np.int32), ("value", np.uint64)])
    edits = np.zeros(512, kind)
    edits["kind"], edits["index"], edits["value"] = constant("OM_EDIT_SOURCE"), np.arange(512), 7
    source = np.zeros(512, np.uint64)
    tables = struct("tables")(source=source.ctypes.data)
    params = struct("apply_params")(tables=tables, edits=edits.ctypes.data, num_edits=count)
    library.launch("om_apply", (2,), (256,), params)
    assert np.flatnonzero(source).tolist() == list(range(count))


@pytest.mark.parametrize("kernel", ["resolve", "admit", "fetch", "take", "finish"])
def test_nothing_is_written_once_the_pass_is_stopped(library: shim.ShimLibrary, kernel: str) -> None:
    layer = two_rows(library, is_stepwise=True)
    if kernel != "resolve":
        layer.resolve()
    if kernel == "fetch":
        layer.admit()
    layer.state.stop = 3
    pairs = junk(2, TOP_K, HIDDEN, dtype=np.float32)
    host_pairs = np.ones_like(pairs)
    names = "key_of slot_of used hits fetched log notice fetches slots host_normed"
    written = [pairs, *(getattr(layer, name) for name in names.split())]
    before, state = [each.copy() for each in written], bytes(layer.state)
    blocks = {"fetch": (2, PAIRS), "take": (PAIRS,)}.get(kernel, (1,))
    threads = {"take": 128, "finish": 32}.get(kernel, 256)
    places = {"host_pairs": host_pairs.ctypes.data, "pairs": pairs.ctypes.data, "stride": TOP_K}
    layer.run(kernel, blocks=blocks, threads=threads, **places)
    assert all(np.array_equal(*pair) for pair in zip(before, written, strict=True))
    assert bytes(layer.state) == state
