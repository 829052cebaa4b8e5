"""Rules 4 and 9 of the device pass in the kernels that decide residency, executed on the CPU, and without each rule."""

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offload_moe.card.structs import constant, struct
from offload_moe.card.worths import in_groups
from tests.support.cuda import shim

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

EMPTY, HOSTS, HIT, MISSED = (constant(f"OM_CARD_{name}") for name in ("EMPTY", "HOSTS", "HIT", "MISSED"))
HEAD, MISSING_STOP = constant("OM_CARD_LOG_HEAD"), constant("OM_STOP_MISSING")
NUM_KEYS, NUM_SLOTS, TOP_K, LAYER, NUM_LAYERS, FIRST_KEY = 16, 6, 4, 1, 3, 8
SLOT_BYTES, SOURCE = 4096, 1 << 20
THREADS = (256,)
RULES = {
    "4: a slot that the host fills": ("key >= OM_CARD_EMPTY && ", ""),
    "4: a slot that this layer uses": ("tables.used[s] != now && ", ""),
    "worth before age": ("is_fresh ? OM_CARD_MOST_WORTH : tables.worth[key];", "0;"),
    "age before worth of late": ("is_fresh ? OM_CARD_MOST_WORTH : ", ""),
    "9: counted again": ("is_again = p.log[0] == p.state->token;", "is_again = 0;"),
}


def build(folder: Path = shim.KERNELS) -> shim.ShimLibrary:
    return shim.ShimLibrary(shim.build('#include "residency.cuh"\n', [f"-I{folder}"], mode="quick"))


@pytest.fixture(scope="module")
def library() -> shim.ShimLibrary:
    return build()


@pytest.fixture
def without(tmp_path: Path) -> Callable[[str], shim.ShimLibrary]:
    """The kernels without a rule."""

    def changed(rule: str) -> shim.ShimLibrary:
        before, after = RULES[rule]
        shutil.copytree(shim.KERNELS, tmp_path / "cuda")
        text = (tmp_path / "cuda" / "residency.cuh").read_text()
        assert text.count(before) == 1
        (tmp_path / "cuda" / "residency.cuh").write_text(text.replace(before, after))
        return build(tmp_path / "cuda")

    return changed


class Layer:
    """The tables of a device, and one row of one layer that chooses the first experts of it."""

    def __init__(self, library: shim.ShimLibrary, key_of: list[int], used: list[int], *, token: int) -> None:
        self.library = library
        self.state = struct("state")(
            num_rows=1, token=token, num_owned=sum(key != HOSTS for key in key_of), num_slots=NUM_SLOTS
        )
        self.key_of, self.used = np.array(key_of, np.int32), np.array(used, np.uint32)
        self.slot_of = np.full(NUM_KEYS, -1, np.int32)
        for slot, key in enumerate(key_of):
            if key >= 0:
                self.slot_of[key] = slot
        self.memory = (1 + np.arange(NUM_SLOTS, dtype=np.uint64)) * np.uint64(SLOT_BYTES)
        self.source = np.full(NUM_KEYS, SOURCE, np.uint64)
        self.worth = np.zeros(NUM_KEYS, np.uint8)
        self.ids, self.weights = np.arange(TOP_K, dtype=np.int32), np.full(TOP_K, 0.25, np.float32)
        self.hits, self.fetched = np.zeros(TOP_K, np.uint64), np.zeros(TOP_K, np.uint64)
        self.log = np.full(HEAD + 6 * TOP_K, -1, np.int32)
        self.notice, self.fetches = struct("notice")(), struct("fetches")()

    def run(self, kernel: str, **others: Any) -> None:
        tables = struct("tables")()
        for name in ("slot_of", "key_of", "used", "worth", "memory", "source"):
            setattr(tables, name, getattr(self, name).ctypes.data)
        state = ctypes.addressof(self.state)
        kind = type(self.state)
        base = struct("pass")(stop=state + kind.stop.offset, num_rows=state + kind.num_rows.offset)
        addresses = {name: getattr(self, name).ctypes.data for name in ("ids", "hits", "log")}
        numbers = {"first_key": FIRST_KEY, "layer": LAYER, "num_layers": NUM_LAYERS, "top_k": TOP_K, "max_rows": 1}
        params = struct(f"{kernel}_params")(
            **{"pass": base}, state=state, tables=tables, **addresses, **numbers, **others
        )
        self.library.launch(f"om_{kernel}", (1,), THREADS, params)

    def resolve(self) -> None:
        self.run("resolve", weights=self.weights.ctypes.data, notice=ctypes.addressof(self.notice))

    def admit(self) -> None:
        self.run("admit", fetched=self.fetched.ctypes.data, fetches=ctypes.addressof(self.fetches))

    @property
    def found(self) -> list[int]:
        """Of each pair, in the log."""
        return self.log[HEAD + 2 * TOP_K : HEAD + 3 * TOP_K].tolist()

    def victims(self) -> list[int]:
        """The slots that change, in their order, once both kernels have run."""
        self.resolve()
        self.admit()
        assert self.state.stop == 0
        changes = self.log[HEAD + 3 * TOP_K :][: 3 * self.log[1]].reshape(-1, 3)
        assert changes[:, 2].tolist() == [FIRST_KEY + expert for expert in range(TOP_K) if self.found[expert] != HIT]
        return changes[:, 0].tolist()


def with_a_slot_of_the_host(library: shim.ShimLibrary) -> list[int]:
    """The host's slot is the oldest, then an empty one; two experts are missing."""
    return Layer(library, [HOSTS, 5, FIRST_KEY, EMPTY, FIRST_KEY + 1, 3], [0, 7, 4, 0, 5, 6], token=3).victims()


def with_stamps_that_have_begun_anew(library: shim.ShimLibrary) -> list[int]:
    """Stamps have passed 2^32: what this layer uses has the least one, and the others have been used of late, too."""
    last, token = 2**32 - 1, 2**32 // NUM_LAYERS
    return Layer(library, [FIRST_KEY, 5, 2, FIRST_KEY + 1, 4, 3], [90, *[last] * 5], token=token).victims()


def test_4_victims_are_the_devices_and_unused_by_the_layer(library: shim.ShimLibrary) -> None:
    assert with_a_slot_of_the_host(library) == [3, 5]
    assert with_stamps_that_have_begun_anew(library) == [1, 2]


def test_4_without_the_rule_other_slots_are_taken(without: Callable[[str], shim.ShimLibrary]) -> None:
    assert 0 in with_a_slot_of_the_host(without("4: a slot that the host fills"))


def test_4_without_the_rule_a_slot_in_use_is_taken(without: Callable[[str], shim.ShimLibrary]) -> None:
    victims = with_stamps_that_have_begun_anew(without("4: a slot that this layer uses"))
    assert set(victims) & {0, 3}


def with_worths(library: shim.ShimLibrary) -> list[int]:
    """Three are missing: an empty slot, then the least worth, of equals the older. One slot is used by the layer."""
    layer = Layer(library, [5, 7, FIRST_KEY, EMPTY, 4, 3], [4, 5, 1, 0, 7, 6], token=3)
    layer.worth[[5, 7, FIRST_KEY, 4, 3]] = [9, 255, 0, 8, 8]
    return layer.victims()


def test_what_is_worth_least_goes_first(library: shim.ShimLibrary) -> None:
    assert with_worths(library) == [3, 5, 4]


def test_without_worths_what_was_used_longest_ago_goes_first(without: Callable[[str], shim.ShimLibrary]) -> None:
    assert with_worths(without("worth before age")) == [3, 0, 1]


def with_some_used_of_late(library: shim.ShimLibrary) -> list[int]:
    """Slot 0 was used by the layer before, slot 4 by the last layer of the pass before: the host counts neither yet."""
    layer = Layer(library, [5, 7, FIRST_KEY, HOSTS, 4, 3], [10, 5, 1, 0, 9, 4], token=3)
    layer.worth[[5, 7, 4, 3]] = [0, 200, 0, 250]
    return layer.victims()


def test_what_was_used_of_late_goes_last(library: shim.ShimLibrary) -> None:
    assert with_some_used_of_late(library) == [1, 5, 4]


def test_without_the_rule_an_old_worth_counts_for_what_was_used_of_late(
    without: Callable[[str], shim.ShimLibrary],
) -> None:
    assert with_some_used_of_late(without("age before worth of late")) == [4, 0, 1]


def test_worths_come_as_groups(library: shim.ShimLibrary) -> None:
    policy = np.array([0, 0.5, 1, 2.5, 1e-9, -0.002, -3, 0.999, 0.25, 1 / 255], np.float32)
    edits = np.zeros(2, np.dtype([("kind", np.int32), ("index", np.int32), ("value", np.uint64)]))
    edits["kind"], edits["index"], edits["value"] = constant("OM_EDIT_WORTHS"), [0, 1], in_groups(policy)
    worth = np.full(24, 77, np.uint8)
    tables = struct("tables")(worth=worth.ctypes.data)
    params = struct("apply_params")(tables=tables, edits=edits.ctypes.data, num_edits=2)
    library.launch("om_apply", (1,), THREADS, params)
    assert worth.tolist() == [0, 127, 255, 255, 0, 0, 0, 254, 63, 1, *[0] * 6, *[77] * 8]


def log_of_a_layer_that_stops(library: shim.ShimLibrary) -> list[int]:
    """One expert has no source: the host brings it to a slot, and the pass goes on behind the router."""
    layer = Layer(library, [FIRST_KEY, FIRST_KEY + 1, FIRST_KEY + 2, EMPTY, 1, 2], [1, 1, 1, 0, 2, 2], token=3)
    layer.source[:] = 0
    layer.resolve()
    assert layer.state.stop == MISSING_STOP
    assert (layer.used == [1, 1, 1, 0, 2, 2]).all()  # a stopped pass has used nothing yet
    before = layer.log.copy()
    layer.key_of[3], layer.slot_of[FIRST_KEY + 3], layer.state.stop = FIRST_KEY + 3, 3, 0
    layer.resolve()
    assert layer.state.stop == 0
    assert (layer.hits == layer.memory[[0, 1, 2, 3]]).all()
    assert before[0] == layer.log[0] == 3
    return layer.found


def test_9_a_layer_that_is_resolved_again_is_counted_once(library: shim.ShimLibrary) -> None:
    assert log_of_a_layer_that_stops(library) == [HIT, HIT, HIT, MISSED]


def test_9_without_the_rule_a_miss_is_counted_as_a_hit(without: Callable[[str], shim.ShimLibrary]) -> None:
    assert log_of_a_layer_that_stops(without("9: counted again")) == [HIT] * TOP_K
