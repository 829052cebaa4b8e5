"""What every replacement policy promises, those of installed extensions included, and what each adds to that."""

import ast
import math
from pathlib import Path

import pytest

import offload_moe.residency.policy as policy_package
from offload_moe.errors import ConfigError
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import DEFAULT_POLICY, POLICY_NAMES, Policy, make_policy, policy_names
from offload_moe.residency.policy.frequency import DecayedFrequency

EXAMPLE = "least-weight"  # of examples/extension
NUM_LAYERS, NUM_EXPERTS = 2, 8
STANDARD = {"abc", "array", "collections", "ctypes", "heapq", "itertools", "math", "typing"}


def nobody(key: int) -> bool:
    return False


def make(name: str, num_slots: int = 4) -> Policy:
    return make_policy(name, ExpertKeys([NUM_EXPERTS] * NUM_LAYERS), num_slots=num_slots)


def use(policy: Policy, *keys: int, layer: int = 0) -> None:
    """Demand each key by an acquire of its own, and keep it."""
    for key in keys:
        policy.access(layer, [key])
        policy.insert(key)


def drain(policy: Policy) -> list[int]:
    victims = []
    while (key := policy.victim(nobody)) is not None:
        policy.remove(key)
        victims.append(key)
    return victims


@pytest.fixture(params=(*policy_names(), EXAMPLE))
def name(request: pytest.FixtureRequest) -> str:
    if request.param == EXAMPLE:
        request.getfixturevalue("example")
    return str(request.param)


@pytest.fixture
def policy(name: str) -> Policy:
    return make(name)


class TestContract:
    def test_knows_its_name(self, name: str) -> None:
        assert make(name).name == name

    def test_nothing_resident_gives_no_victim(self, policy: Policy) -> None:
        policy.access(0, [1, 2])
        assert policy.victim(nobody) is None

    def test_all_leased_gives_no_victim(self, policy: Policy) -> None:
        use(policy, 1, 2, 3)
        assert policy.victim(lambda key: True) is None
        assert policy.victim(nobody) in {1, 2, 3}  # and that refusal cost nothing

    @pytest.mark.parametrize("spared", [1, 2, 3])
    def test_only_the_unleased_key_can_be_the_victim(self, policy: Policy, spared: int) -> None:
        use(policy, 1, 2, 3)
        assert policy.victim(lambda key: key != spared) == spared

    def test_asking_twice_gives_the_same_victim(self, policy: Policy) -> None:
        use(policy, 3, 1, 2)
        first = policy.victim(nobody)
        policy.victim(lambda key: key == first)
        assert policy.victim(nobody) == first

    def test_every_resident_key_is_a_victim_once(self, policy: Policy) -> None:
        use(policy, 3, 1, 2, 7)
        assert sorted(drain(policy)) == [1, 2, 3, 7]
        assert policy.victim(nobody) is None

    def test_removed_keys_may_come_back(self, policy: Policy) -> None:
        for _ in range(3):
            use(policy, 1, 2)
            policy.remove(1)
            assert policy.victim(nobody) == 2
            policy.insert(1)
            assert sorted(drain(policy)) == [1, 2]

    def test_prefetched_keys_were_never_accessed(self, policy: Policy) -> None:
        policy.insert(5)
        policy.insert(9)
        assert sorted(drain(policy)) == [5, 9]

    def test_serves_a_single_layer_with_model_wide_keys(self, name: str) -> None:
        policy = make_policy(name, ExpertKeys([NUM_EXPERTS] * 6), num_slots=4, layers=range(5, 6))
        use(policy, 40, 47, layer=5)
        assert sorted(drain(policy)) == [40, 47]

    def test_weights_are_accepted(self, policy: Policy) -> None:
        policy.access(1, [9, 8], [0.75, 0.25])
        policy.insert(9)
        assert policy.victim(nobody) == 9

    def test_an_acquire_may_route_to_nothing(self, policy: Policy) -> None:
        for _ in range(3):
            policy.access(0, [])
            policy.access(1, [])
        policy.insert(2)
        assert policy.victim(nobody) == 2

    def test_hot_expert_outlives_a_cold_one(self, policy: Policy) -> None:
        hot, cold = 0, 1
        policy.access(0, [hot, cold])
        policy.insert(hot)
        policy.insert(cold)
        for _ in range(40):
            policy.access(0, [hot])
            policy.access(1, [NUM_EXPERTS])
        assert policy.victim(nobody) == cold

    def test_a_pool_of_another_size_forgets_nothing(self, name: str) -> None:
        one, two = make(name), make(name)
        for policy in (one, two):
            for token in range(30):
                policy.access(0, [token * token % 8, 7])
                policy.access(1, [8 + token % 3])
            for key in range(11):
                policy.insert(key)
            if policy is two:
                policy.resize(16)
                policy.resize(4)
        assert drain(one) == drain(two)

    def test_same_calls_give_the_same_victims(self, name: str) -> None:
        one, two = make(name), make(name)
        for policy in (one, two):
            for token in range(50):
                use(policy, token * 3 % 8)
                use(policy, 8 + token * 5 % 8, layer=1)
                for _ in range(2):
                    policy.remove(policy.victim(nobody) or 0)
            policy.insert(3)
            policy.insert(4)
        assert drain(one) == drain(two)


class TestFactory:
    def test_default_is_one_of_them(self) -> None:
        assert DEFAULT_POLICY in POLICY_NAMES

    def test_unknown_name_lists_the_known(self) -> None:
        with pytest.raises(ConfigError, match="lru") as caught:
            make("fifo")
        assert all(name in str(caught.value) for name in ("fifo", *POLICY_NAMES))


def test_lru_evicts_the_oldest_use() -> None:
    policy = make("lru")
    use(policy, 1, 2, 3)
    policy.access(0, [1])
    assert drain(policy) == [2, 3, 1]


def test_lfu_evicts_the_fewest_uses_and_remembers_across_evictions() -> None:
    policy = make("lfu")
    use(policy, 1, 2)
    policy.access(0, [1])
    policy.access(0, [2])
    policy.remove(1)
    use(policy, 3)
    policy.insert(1)
    assert drain(policy) == [3, 1, 2]  # 1 has two uses from its earlier stay; the older last use loses the tie


def test_decayed_frequency_weighs_a_use_by_its_age() -> None:
    policy = DecayedFrequency(half_life=1.0)
    use(policy, 1, 2)  # uses at tokens 1 and 2
    policy.access(0, [1])  # 1: 1/4 + 1 at token 3, 2: 1/2
    assert policy.victim(nobody) == 2
    for _ in range(2):
        policy.access(0, [2])  # token 5: 2 is at 1/8 + 1/2 + 1
    assert policy.victim(nobody) == 1


def test_decayed_frequency_equals_the_sum_of_decayed_uses() -> None:
    policy, half_life = DecayedFrequency(half_life=3.0), 3.0
    uses = {1: [1, 2, 9], 2: [8], 3: [3, 4, 5, 6, 7]}
    for token in range(1, 11):
        policy.access(0, [key for key, tokens in uses.items() if token in tokens])
    for key, tokens in uses.items():
        policy.insert(key)
        expected = sum(2.0 ** ((token - 10) / half_life) for token in tokens)
        assert math.isclose(2.0 ** (policy._rank[key] - 10 / half_life), expected)
    assert policy.victim(nobody) == 2


def test_slru_protects_what_was_used_again() -> None:
    policy = make("slru", num_slots=4)
    use(policy, 1, 2)
    policy.access(0, [1])
    use(policy, 3)
    assert drain(policy) == [2, 3, 1]


def test_slru_returns_the_oldest_protected_to_probation() -> None:
    policy = make("slru", num_slots=4)  # room for two protected
    use(policy, 1, 2, 3)
    for key in (1, 2, 3):
        policy.access(0, [key])
    assert drain(policy) == [1, 2, 3]


def test_slru_protects_fewer_in_a_smaller_pool() -> None:
    policy = make("slru", num_slots=8)  # room for four protected
    use(policy, 1, 2, 3)
    policy.access(0, [1])
    policy.access(0, [2])
    policy.resize(2)
    assert drain(policy) == [3, 1, 2]


def test_lru_2_evicts_by_the_second_last_use() -> None:
    policy = make("lru-2")
    use(policy, 1, 2)
    policy.access(0, [2])
    policy.access(0, [1])
    use(policy, 3)  # the most recent, but used once
    assert drain(policy) == [3, 1, 2]


def test_no_policy_imports_torch_or_a_room_above() -> None:
    allowed = {
        "numpy",
        "offload_moe.errors",
        "offload_moe.system.extensions",
        "offload_moe.system.names",
        "offload_moe.native.library",
        "offload_moe.native.structs",
        "offload_moe.residency.keys",
        "offload_moe.residency.policy",
    }
    for path in Path(policy_package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                is_standard = name.split(".")[0] in STANDARD
                assert is_standard or any(name == a or name.startswith(a + ".") for a in allowed), (
                    f"{path.name}: {name}"
                )
