"""The default policy: what it learns, and what it survives."""

from itertools import pairwise

import numpy as np
import pytest
from support.numpy_ranking import NumpyRanking, observe, predict, update

from offload_moe.profile.replay import replay
from offload_moe.profile.trace import Trace
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import knn as default_policy
from offload_moe.residency.policy.history import NUM_AHEAD, History
from offload_moe.residency.policy.knn import KNN
from offload_moe.residency.policy.ranking import Ranking
from offload_moe.residency.policy.reuse import PRIOR_WEIGHTS, ReuseModel

NUM_LAYERS, NUM_EXPERTS, TOP_K, NUM_SLOTS = 4, 16, 2, 16
KEYS = ExpertKeys([NUM_EXPERTS] * NUM_LAYERS)


def nobody(key: int) -> bool:
    return False


def trace_of(experts: np.ndarray) -> Trace:
    return Trace(experts=experts, num_experts=NUM_EXPERTS, sequence_lengths=np.array([len(experts)]))


def random_routing(num_tokens: int, seed: int) -> np.ndarray:
    scores = np.random.default_rng(seed).random((num_tokens, NUM_LAYERS, NUM_EXPERTS))
    return np.argsort(scores, axis=-1)[..., :TOP_K]


def sticky_routing(num_tokens: int) -> np.ndarray:
    """Each token keeps the experts of the one before with probability 0.9."""
    experts = random_routing(num_tokens, seed=1)
    keeps = np.random.default_rng(2).random((num_tokens, NUM_LAYERS)) < 0.9
    for token in range(1, num_tokens):
        experts[token, keeps[token]] = experts[token - 1, keeps[token]]
    return experts


class TestHistory:
    def test_recalls_what_followed_the_same_routing(self) -> None:
        history = History(num_keys=8, discount=0.5, num_tokens=64)
        for used in ([0, 1], [2, 3], [4, 5], [6, 7], [0, 1]):
            observe(history, np.array(used), 1)
            reuse, trust = predict(history, 0, 8)
            history.advance()
        assert trust > 0
        assert reuse[2] == reuse[3] == pytest.approx(trust, rel=0.01)  # after (0, 1) came (2, 3): at once
        assert reuse[4] == pytest.approx(trust / 2, rel=0.02)
        assert reuse[6] == pytest.approx(trust / 4, rel=0.03)

    def test_first_use_counts_not_the_last(self) -> None:
        history = History(num_keys=8, discount=0.5, num_tokens=64)
        for used in ([0], [1], [1], [1], [0]):
            observe(history, np.array(used), 1)
            reuse, trust = predict(history, 0, 8)
            history.advance()
        assert reuse[1] == pytest.approx(trust, rel=0.01)

    def test_forgets_after_a_full_ring(self) -> None:
        history = History(num_keys=8, discount=0.5, num_tokens=64)
        for used, remembered in (([0], 0.0), ([2], 0.0), ([0], 1.0), *[([1], None)] * (64 + NUM_AHEAD), ([0], 0.0)):
            observe(history, np.array(used), 1)
            if remembered is not None:
                reuse, trust = predict(history, 0, 8)
                assert reuse[2] == pytest.approx(remembered * trust, rel=0.01)
            history.advance()

    def test_nothing_is_predicted_at_first(self) -> None:
        history = History(num_keys=8, discount=0.5)
        observe(history, np.array([0, 1]), 1)
        reuse, trust = predict(history, 0, 8)
        assert trust == 0.0
        assert not reuse.any()


class TestReuseModel:
    def test_learns_which_feature_to_trust(self) -> None:
        """Expert 0 is always used again at once, expert 1 never, and only the neighbours can tell them apart."""
        model = ReuseModel(num_keys=2, discount=0.5)
        random = np.random.default_rng(0)
        coming = random.random((4000, 2)) < 0.3
        for now, after in pairwise(coming):
            predicted = np.where(after, 1.0, 0.1).astype(np.float32)
            worth = update(model, 0, 2, now.astype(np.float32), predicted, 1.0, learn=True)
            model.advance()
        assert worth[after].min(initial=1.0) > 0.8
        assert worth[~after].max(initial=0.0) < 0.5

    def test_does_not_learn_from_chunks(self) -> None:
        model = ReuseModel(num_keys=2, discount=0.5)
        before = model.covariance.copy()
        for _ in range(40):
            update(model, 0, 2, np.ones(2, np.float32), np.ones(2, np.float32), 1.0, learn=False)
            model.advance()
        assert (model.covariance == before).all()


class TestKNN:
    def test_repeated_text_is_foreseen(self) -> None:
        """Fifty random tokens over and over: frequencies and recency say nothing, what followed last time says all."""
        trace = trace_of(np.concatenate([random_routing(50, seed=0)] * 8))
        num_slots = NUM_LAYERS * NUM_EXPERTS // 4
        knn, lru, belady = (replay(trace, name, num_slots=num_slots).hit_rate for name in ("knn", "lru", "belady"))
        assert lru < 0.3
        assert knn > lru + 0.7 * (belady - lru)

    def test_sticky_routing_is_no_worse_than_lru_per_layer(self) -> None:
        trace = trace_of(sticky_routing(600))
        num_slots = NUM_LAYERS * NUM_EXPERTS // 4
        lru = replay(trace, "lru", num_slots=num_slots, pool="layer").hit_rate
        assert replay(trace, "knn", num_slots=num_slots).hit_rate > lru - 0.01

    def test_layer_just_passed_gives_way_before_a_layer_to_come(self) -> None:
        """Equal statistics everywhere: what tells the experts apart is when their layer comes round."""
        policy = KNN(KEYS, range(NUM_LAYERS), NUM_SLOTS)
        for token in range(12):
            for layer in range(NUM_LAYERS):
                policy.access(layer, [layer * NUM_EXPERTS])
                if not token:
                    policy.insert(layer * NUM_EXPERTS)
        for layer in (0, 1):
            policy.access(layer, [layer * NUM_EXPERTS])
        order = []
        while (key := policy.victim(nobody)) is not None:
            policy.remove(key)
            order.append(key // NUM_EXPERTS)
        assert sorted(order[:2]) == [0, 1]

    def test_a_larger_pool_looks_further_ahead(self) -> None:
        resized, made_so = (KNN(KEYS, range(NUM_LAYERS), num_slots) for num_slots in (8, 32))
        resized.resize(32)
        for policy in (resized, made_so):
            assert policy.ranking.discount == policy.ranking.reuse.discount == made_so.ranking.discount
            assert policy.ranking.history._fading == made_so.ranking.history._fading

    def test_prefetched_expert_is_kept_until_its_layer_has_come(self) -> None:
        policy, every_fourth, never_used = (
            KNN(KEYS, range(NUM_LAYERS), NUM_SLOTS),
            NUM_EXPERTS,
            3 * NUM_EXPERTS + 7,
        )
        for token in range(20):
            for layer in range(NUM_LAYERS):
                policy.access(layer, [layer * NUM_EXPERTS + token % 4])
                if layer * NUM_EXPERTS + token == every_fourth:
                    policy.insert(every_fourth)
        policy.access(0, [0])
        policy.access(1, [every_fourth])
        policy.insert(never_used)
        assert policy.victim(nobody) == every_fourth
        policy.access(2, [2 * NUM_EXPERTS])
        policy.access(3, [3 * NUM_EXPERTS])
        assert policy.victim(nobody) == never_used

    def test_experts_asked_for_one_by_one_are_one_token(self) -> None:
        """A tier below another sees single misses; they must not look like tokens."""
        policy = KNN(KEYS, range(NUM_LAYERS), NUM_SLOTS)
        for _ in range(3):
            for layer in range(NUM_LAYERS):
                for expert in (3, 1, 2):
                    policy.access(layer, [layer * NUM_EXPERTS + expert])
        assert policy.ranking.history._now == 2

    @pytest.mark.parametrize("is_native", [True, False])
    def test_chunks_without_end_leave_a_victim(self, is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """What could be matched fades with every token that is not remembered, and must not fade to nothing."""
        use_native(monkeypatch, is_native=is_native)
        policy = KNN(KEYS, range(NUM_LAYERS), NUM_SLOTS)
        policy.access(0, [1, 2])
        policy.insert(1)
        for _ in range(400):
            for layer in range(NUM_LAYERS):
                policy.access(layer, [layer * NUM_EXPERTS + expert for expert in range(NUM_EXPERTS)], num_tokens=9)
        assert np.isfinite(policy.ranking.worth).all()
        assert policy.victim(nobody) == 1

    def test_a_prompt_chunk_is_not_remembered(self) -> None:
        policy = KNN(ExpertKeys([NUM_EXPERTS]), range(1), NUM_SLOTS)
        for _ in range(5):
            policy.access(0, list(range(NUM_EXPERTS)))
        policy.access(0, [1, 2])
        assert predict(policy.ranking.history, 0, NUM_EXPERTS)[1] == 0.0


def test_a_chunk_tells_which_experts_its_tokens_like() -> None:
    policy = KNN(ExpertKeys([NUM_EXPERTS]), range(1), NUM_SLOTS)
    everyone = list(range(NUM_EXPERTS))
    liked = 3
    policy.access(0, everyone, [0.9 if expert == liked else 0.05 for expert in everyone], num_tokens=64)
    for key in everyone:
        policy.insert(key)
    policy.access(0, [0])
    victims = []
    for _ in range(NUM_EXPERTS - 2):
        victim = policy.victim(nobody)
        assert victim is not None
        policy.remove(victim)
        victims.append(victim)
    assert liked not in victims


def test_a_chunk_evicts_what_it_has_passed_before_what_lies_ahead() -> None:
    policy = KNN(KEYS, range(NUM_LAYERS), NUM_SLOTS)
    for layer in range(NUM_LAYERS):  # a token that everything is resident for
        policy.access(layer, [layer * NUM_EXPERTS])
    for key in range(NUM_LAYERS * NUM_EXPERTS):
        policy.insert(key)
    for layer in range(NUM_LAYERS - 1):
        policy.access(layer, range(layer * NUM_EXPERTS, (layer + 1) * NUM_EXPERTS))
        victim = policy.victim(lambda key, now=layer: key // NUM_EXPERTS == now)
        assert victim is not None
        if layer >= 2:  # ranked two layers at a time
            assert victim // NUM_EXPERTS < layer
            policy.remove(victim)
            policy.insert((layer + 1) * NUM_EXPERTS)  # fetched ahead of its layer
            again = policy.victim(lambda key, now=layer: key // NUM_EXPERTS == now)
            assert again is not None
            assert again // NUM_EXPERTS < layer


class TestNativeRanking:
    """Against the ranking in numpy."""

    @pytest.mark.parametrize("num_experts", [NUM_EXPERTS, 48])
    def test_the_same_numbers(self, num_experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Steps, chunks, a layer asked twice, and a pool that grows: both are told the same."""
        layers, first_key = range(3, 3 + NUM_LAYERS), 3 * num_experts
        native, plain = (policy_with(monkeypatch, layers, num_experts, is_native=is_native) for is_native in (1, 0))
        assert type(native.ranking) is Ranking
        assert type(plain.ranking) is NumpyRanking
        random = np.random.default_rng(3)
        for token, routed in enumerate(sticky_routing(80)):
            is_chunk = token % 30 == 7
            for position, experts in enumerate(routed):
                used = range(num_experts) if is_chunk else (experts * (num_experts // NUM_EXPERTS)).tolist()
                keys = [first_key + position * num_experts + expert for expert in used]
                shares = random.random(len(keys)).tolist()
                for policy in (native, plain):
                    policy.access(layers[position], keys, shares, 20 if is_chunk else 1)
                    if token % 10 == 3:
                        policy.access(layers[position], keys[:1])
                    if token < 8 and keys[0] - first_key not in np.flatnonzero(policy.ranking.absent == 0):
                        policy.insert(keys[0])
                assert native.victim(nobody) == plain.victim(nobody)
                assert native.ranking.worth == pytest.approx(plain.ranking.worth, rel=1e-3, abs=1e-4)
                assert native.ranking.order == pytest.approx(plain.ranking.order, rel=1e-3, abs=1e-4)
            for policy in (native, plain):
                if token == 40:
                    policy.resize(2 * NUM_SLOTS)
        assert native.ranking.reuse.weights == pytest.approx(plain.ranking.reuse.weights, rel=1e-2, abs=1e-3)
        assert native.ranking.reuse.weights != pytest.approx(PRIOR_WEIGHTS, abs=1e-2)

    def test_as_many_hits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trace = trace_of(np.concatenate([sticky_routing(200), random_routing(50, seed=0), sticky_routing(200)]))
        rates = []
        for is_native in (True, False):
            use_native(monkeypatch, is_native=is_native)
            rates.append(replay(trace, "knn", num_slots=NUM_SLOTS).hit_rate)
        assert rates[0] == pytest.approx(rates[1], abs=0.005)


def use_native(monkeypatch: pytest.MonkeyPatch, *, is_native: bool) -> None:
    monkeypatch.setattr(default_policy, "Ranking", Ranking if is_native else NumpyRanking)


def policy_with(monkeypatch: pytest.MonkeyPatch, layers: range, num_experts: int, *, is_native: bool) -> KNN:
    use_native(monkeypatch, is_native=is_native)
    return KNN(ExpertKeys([num_experts] * layers.stop), layers, NUM_SLOTS)


@pytest.mark.parametrize("num_layers", [3, 4])
def test_a_token_noted_at_once_is_the_same_as_layer_by_layer(num_layers: int) -> None:
    """Also behind a chunk, a token that ended early, and one of another shape."""
    keys = ExpertKeys([NUM_EXPERTS] * num_layers)
    single, whole = (KNN(keys, range(num_layers), NUM_SLOTS) for _ in range(2))
    draw, resident = np.random.default_rng(3), list(range(NUM_SLOTS))
    for policy in (single, whole):
        for key in resident:
            policy.insert(key)
    for token in range(40):
        top_k = 3 if token == 20 else TOP_K
        used = [[keys.key(at, int(e)) for e in draw.permutation(NUM_EXPERTS)[:top_k]] for at in range(num_layers)]
        if token in (7, 21):
            used = used[:2] if token == 7 else [list(range(keys.first(at), keys.end(at))) for at in range(num_layers)]
        for at, each in enumerate(used):
            single.access(at, each)
        whole.access_token(0, used)
        victims = {policy.victim(nobody) for policy in (single, whole)}
        assert len(victims) == 1
        for policy in (single, whole):
            policy.remove(*victims)
            policy.insert(used[0][0]) if used[0][0] not in resident else policy.insert(*victims)
        if used[0][0] not in resident:
            resident = [key for key in resident if key not in victims] + [used[0][0]]
        assert np.array_equal(single.worths, whole.worths)
        assert np.array_equal(single.ranking.order, whole.ranking.order)
    assert whole.ranking.reuse.evidence.tolist() == single.ranking.reuse.evidence.tolist()
    assert whole.worths.any()
