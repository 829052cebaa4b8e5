"""The trace file: what is kept, what is refused and how it says so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offload_moe.errors import ConfigError
from offload_moe.profile.trace import Trace, load_trace, save_trace

NUM_TOKENS, NUM_LAYERS, TOP_K, NUM_EXPERTS, NUM_FORWARDS = 5, 3, 2, 8, 4


def arrays() -> dict[str, Any]:
    random = np.random.default_rng(0)
    shape = (NUM_TOKENS, NUM_LAYERS, TOP_K)
    return {
        "experts": np.argsort(random.random((*shape[:2], NUM_EXPERTS)), axis=-1)[..., :TOP_K].astype(np.uint8),
        "num_experts": NUM_EXPERTS,
        "sequence_lengths": np.array([2, 3], dtype=np.int32),
    }


def full() -> Trace:
    random = np.random.default_rng(1)
    per_forward = (NUM_FORWARDS, NUM_LAYERS, 2)
    return Trace(
        **arrays(),
        weights=random.random((NUM_TOKENS, NUM_LAYERS, TOP_K)).astype(np.float16),
        router_probabilities=random.random((NUM_TOKENS, NUM_LAYERS, NUM_EXPERTS)).astype(np.float16),
        token_ids=np.arange(NUM_TOKENS),
        is_prompt=np.array([True, True, False, False, False]),
        forwards=np.array([0, 0, 1, 2, 3]),
        tiers=("vram", "ram"),
        outcomes=random.integers(0, 3, (NUM_TOKENS, NUM_LAYERS, TOP_K, 2)),
        computed_on_cpu=np.zeros((NUM_TOKENS, NUM_LAYERS, TOP_K), dtype=bool),
        stall_s=random.random(per_forward),
        loaded_bytes=random.integers(0, 9, per_forward),
        prefetch_issued=random.integers(0, 9, per_forward),
        prefetch_useful=random.integers(0, 9, per_forward),
        compute_s=random.random((NUM_FORWARDS, NUM_LAYERS)),
        forward_s=random.random(NUM_FORWARDS),
        metadata='{"model": "tiny"}',
    )


class TestRoundTrip:
    def test_everything_comes_back(self, tmp_path: Path) -> None:
        path = tmp_path / "no-suffix"
        save_trace(full(), path)
        for name, array in ((n, getattr(full(), n)) for n in Trace.__slots__):
            np.testing.assert_array_equal(getattr(load_trace(path), name), array, err_msg=name)

    def test_the_minimal_file_is_enough(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", experts=arrays()["experts"], num_experts=np.int32(NUM_EXPERTS), unknown=np.ones(3))
        trace = load_trace(tmp_path / "t.npz")
        assert (trace.num_tokens, trace.num_layers, trace.top_k) == (NUM_TOKENS, NUM_LAYERS, TOP_K)
        assert trace.sequence_lengths.tolist() == [NUM_TOKENS]
        assert trace.weights is None
        assert trace.tiers == ()


class TestSelection:
    def test_select_takes_sequences_in_the_given_order(self) -> None:
        trace = full().select([1, 0])
        assert trace.sequence_lengths.tolist() == [3, 2]
        assert trace.token_ids is not None
        assert trace.token_ids.tolist() == [2, 3, 4, 0, 1]
        np.testing.assert_array_equal(trace.experts, full().experts[[2, 3, 4, 0, 1]])
        assert trace.stall_s is None

    @pytest.mark.parametrize(("num_tokens", "lengths"), [(1, [1]), (2, [2]), (4, [2, 2]), (99, [2, 3])])
    def test_head_cuts_the_last_sequence(self, num_tokens: int, lengths: list[int]) -> None:
        trace = full().head(num_tokens)
        assert trace.sequence_lengths.tolist() == lengths
        assert trace.num_tokens == sum(lengths)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"experts": np.zeros((3, 2), dtype=np.uint8)}, "tokens, layers, top-k"),
            ({"experts": np.zeros((0, 3, 2), dtype=np.uint8)}, "not empty"),
            ({"experts": arrays()["experts"].astype(np.float32)}, "experts has type float32"),
            ({"num_experts": 4}, r"must lie in 0\.\.3"),
            (
                {"experts": np.zeros((NUM_TOKENS, NUM_LAYERS, TOP_K), dtype=np.int16)},
                "token 0, layer 0 lists an expert",
            ),
            ({"experts": arrays()["experts"].astype(np.int16) - 1}, r"found -1\.\."),
            ({"sequence_lengths": np.array([2, 2])}, "sum to 4 tokens, experts has 5"),
            ({"sequence_lengths": np.array([7, -2])}, "sequence_lengths"),
            ({"weights": np.ones((NUM_TOKENS, NUM_LAYERS, 3))}, r"weights has shape \[5, 3, 3\], expected \[5, 3, 2\]"),
            ({"weights": np.ones((NUM_TOKENS, NUM_LAYERS, TOP_K), dtype=int)}, "weights has type int64"),
            ({"stall_s": np.ones((4, NUM_LAYERS, 1)), "tiers": ("ram", "disk")}, "stall_s has shape"),
            ({"forward_s": np.ones(3), "compute_s": np.ones((4, NUM_LAYERS))}, "forward_s has shape"),
            ({"is_prompt": np.zeros(NUM_TOKENS, dtype=np.uint8)}, "is_prompt has type uint8"),
            ({"experts_per_layer": np.array([8, 8])}, r"experts_per_layer has shape \[2\], expected \[3\]"),
            ({"experts_per_layer": np.array([7, 6, 7])}, "at most 7 experts, num_experts says 8"),
            ({"experts_per_layer": np.array([8, 1, 8])}, "layer 1 has 1 experts, found expert"),
            ({"experts_per_layer": np.array([8, -1, 8])}, "layer 1 has -1 experts"),
            ({"experts_per_layer": np.array([8.0, 8.0, 8.0])}, "experts_per_layer has type float64"),
        ],
    )
    def test_arrays_that_do_not_fit(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Trace(**{**arrays(), **change})

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"absent\.npz does not exist"):
            load_trace(tmp_path / "absent.npz")

    @pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 torn"])
    def test_not_an_npz(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "t.npz"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="not a readable npz file"):
            load_trace(path)

    def test_a_torn_file(self, tmp_path: Path) -> None:
        save_trace(full(), tmp_path / "t.npz")
        content = (tmp_path / "t.npz").read_bytes()
        (tmp_path / "t.npz").write_bytes(content[: len(content) // 2])
        with pytest.raises(ConfigError, match="not a readable npz file"):
            load_trace(tmp_path / "t.npz")

    def test_a_plain_npy_file(self, tmp_path: Path) -> None:
        np.save(tmp_path / "t.npy", np.ones(3))
        with pytest.raises(ConfigError, match="not a readable npz file"):
            load_trace(tmp_path / "t.npy")

    @pytest.mark.parametrize("absent", ["experts", "num_experts"])
    def test_required_arrays(self, tmp_path: Path, absent: str) -> None:
        values = arrays()
        del values[absent]
        np.savez(tmp_path / "t.npz", **values)
        with pytest.raises(ConfigError, match=f"no array '{absent}'"):
            load_trace(tmp_path / "t.npz")

    def test_pickled_objects_are_not_loaded(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", experts=np.array([{}], dtype=object), num_experts=8)
        with pytest.raises(ConfigError, match="not a readable npz file"):
            load_trace(tmp_path / "t.npz")

    def test_several_numbers_of_experts(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", **{**arrays(), "num_experts": np.array([8, 8])})
        with pytest.raises(ConfigError, match="num_experts must be one integer"):
            load_trace(tmp_path / "t.npz")

    def test_the_file_is_named(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", **{**arrays(), "sequence_lengths": np.array([1])})
        with pytest.raises(ConfigError, match=r"t\.npz: sequence_lengths"):
            load_trace(tmp_path / "t.npz")


def test_layers_of_different_sizes(tmp_path: Path) -> None:
    experts = arrays()["experts"]
    experts[:, 1] %= 2
    experts[:, 1, 1] = 1 - experts[:, 1, 0]
    sizes = np.array([8, 2, 8])
    trace = Trace(**{**arrays(), "experts": experts, "experts_per_layer": sizes})
    save_trace(trace, tmp_path / "t.npz")
    for found in (load_trace(tmp_path / "t.npz"), trace.head(3), trace.select([1])):
        assert found.keys.num_experts == (8, 2, 8)
    assert Trace(**arrays()).keys.num_experts == (8, 8, 8)
