"""Keys of experts, where layers have different numbers of them."""

import pytest

from offload_moe.residency.keys import ExpertKeys

KEYS = ExpertKeys([5, 1, 3])


def test_keys_follow_each_other_by_layer_and_expert() -> None:
    places = [(layer, expert) for layer, count in enumerate([5, 1, 3]) for expert in range(count)]
    assert [KEYS.key(layer, expert) for layer, expert in places] == list(range(9))
    assert [KEYS.layer_expert(key) for key in range(9)] == places
    assert KEYS.keys(2, [2, 0]) == [8, 6]
    assert [(KEYS.first(layer), KEYS.end(layer)) for layer in range(3)] == [(0, 5), (5, 6), (6, 9)]
    assert (KEYS.num_layers, KEYS.total, KEYS.most) == (3, 9, 5)


def test_equal_layers_have_the_keys_of_a_stride() -> None:
    equal = ExpertKeys([4] * 3)
    assert [equal.key(layer, expert) for layer in range(3) for expert in range(4)] == list(range(12))
    assert all(equal.layer_expert(key) == divmod(key, 4) for key in range(12))


def test_values_by_layer_and_back() -> None:
    rows = KEYS.rows(lambda key: 10 * key)
    assert rows == [[0, 10, 20, 30, 40], [50], [60, 70, 80]]
    assert KEYS.from_rows(rows) == {key: 10 * key for key in range(9)}


@pytest.mark.parametrize("rows", [[[0] * 5] * 3, [[0] * 5, [0], [0] * 3, []], [[0] * 9], []])
def test_rows_of_other_layers_are_refused(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="do not fit layers"):
        KEYS.from_rows(rows)
