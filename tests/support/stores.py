"""What tests ask of expert stores."""

from pathlib import Path

import torch

from offload_moe.store import Store


def check_all(store: Store) -> None:
    """Read everything and compare it with its checksum. Raises: StoreCorrupt."""
    for piece in store.pieces():
        piece.check()


def assert_same_stores(first: Path, second: Path) -> None:
    """Every record and dense tensor has the same bytes."""
    a, b = Store.open(first), Store.open(second)
    assert list(a.dense) == list(b.dense)
    for name in a.dense:
        assert a.dense[name].dtype == b.dense[name].dtype
        assert torch.equal(a.read_dense(name), b.read_dense(name)), name
    for ordinal, layer in enumerate(b.layers):
        for expert in range(layer.num_experts):
            assert torch.equal(a.read_expert(ordinal, expert), b.read_expert(ordinal, expert)), (ordinal, expert)
