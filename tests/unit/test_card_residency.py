"""Rules 4 and 9 of the device pass in the kernels that decide residency, executed on the CPU, and without each rule."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from offload_moe.card.structs import constant, struct
from offload_moe.card.worths import in_groups
from tests.support.cuda import shim
from tests.support.cuda.residency import EMPTY, FIRST_KEY, HIT, HOSTS, MISSED, NUM_LAYERS, TOP_K, Layer, build

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")

MISSING_STOP = constant("OM_STOP_MISSING")
RULES = {
    "4: a slot that the host fills": ("key >= OM_CARD_EMPTY && ", ""),
    "4: a slot that this layer uses": ("tables.used[s] != now && ", ""),
    "worth before age": ("is_fresh ? OM_CARD_MOST_WORTH : tables.worth[key];", "0;"),
    "age before worth of late": ("is_fresh ? OM_CARD_MOST_WORTH : ", ""),
    "9: counted again": ("is_again = p.log[0] == p.state->token;", "is_again = 0;"),
}


@pytest.fixture(scope="module")
def library() -> shim.ShimLibrary:
    return build()


@pytest.fixture
def without(tmp_path: Path) -> Callable[[str], shim.ShimLibrary]:
    """The kernels without a rule, never sanitized: they may read what is not theirs."""

    def changed(rule: str) -> shim.ShimLibrary:
        before, after = RULES[rule]
        shutil.copytree(shim.KERNELS, tmp_path / "cuda")
        text = (tmp_path / "cuda" / "residency.cuh").read_text()
        assert text.count(before) == 1
        (tmp_path / "cuda" / "residency.cuh").write_text(text.replace(before, after))
        return build(tmp_path / "cuda", mode="quick")

    return changed


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
    layer = Layer(library, [5, 7, FIRST_KEY, EMPTY, 4, 3], [4, 5, 1, 0, 2**31, 6], token=2**30)
    layer.worth[[5, 7, FIRST_KEY, 4, 3]] = [9, 255, 0, 8, 8]
    return layer.victims()


def test_what_is_worth_least_goes_first(library: shim.ShimLibrary) -> None:
    assert with_worths(library) == [3, 5, 4]


def test_without_worths_what_was_used_longest_ago_goes_first(without: Callable[[str], shim.ShimLibrary]) -> None:
    assert with_worths(without("worth before age")) == [3, 0, 1]


def with_some_used_of_late(library: shim.ShimLibrary) -> list[int]:
    """Slot 0 was used by the layer before, slot 4 by the last layer of the pass before: the host counts neither yet.

    Slot 1 was used by this layer in the pass before.
    """
    layer = Layer(library, [5, 7, FIRST_KEY, HOSTS, 4, 3], [10, 8, 1, 0, 9, 4], token=3)
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
    library.launch("om_apply", (1,), (256,), params)
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
