"""Stores made of a GGUF file are repaired from that file: of its bits, and of what was quantized anew."""

from pathlib import Path
from typing import Any

import pytest

from offload_moe.convert.quantize import quantize
from offload_moe.convert.repair import find_damage, has_known_source, repair, restore_sizes
from offload_moe.errors import ConfigError
from offload_moe.store import Store
from tests.support.gguf_models import write_model
from tests.support.hub import COMMIT, hub_in_use

SMALL: dict[str, Any] = {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf"), "qwen3_moe", tensors_per_file=5, **SMALL).path


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def damage(path: Path) -> Store:
    """Every data file is zeros, and a small one is gone."""
    for file in path.glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    (path / "config.json").unlink()
    restore_sizes(path)
    return Store.open(path)


@pytest.mark.parametrize("options", [{}, {"codec": "nf4", "dense_codec": "int8"}])
def test_every_piece_is_made_again(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    path = quantize(source, tmp_path / "store", **options)
    before = content(path)
    store = damage(path)
    assert repair(store, find_damage(store)) == []
    assert content(path) == before


def test_another_file_repairs_nothing(source: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", "qwen3_moe", "Q8_0", {}, **SMALL).path
    store = Store.open(quantize(source, tmp_path / "store"))
    record = store.record(0, 1)
    data = bytearray(record.path.read_bytes())
    data[record.offset] ^= 1
    record.path.write_bytes(data)
    damages = find_damage(store)
    assert repair(store, damages, other) == damages
    assert record.path.read_bytes() == data
    (tmp_path / "folder").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "folder" / name).write_bytes((store.path / name).read_bytes())
    (tmp_path / "folder" / "model.gguf").write_bytes(other.read_bytes())
    with pytest.raises(ConfigError, match="has the bits of a GGUF file"):
        repair(store, damages, tmp_path / "folder")


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", "qwen3_moe", **SMALL).path
    store = damage(quantize(path, tmp_path / "store"))
    assert has_known_source(store)
    path.rename(tmp_path / "elsewhere.gguf")
    assert not has_known_source(store)
    with pytest.raises(ConfigError, match=r"a file named .*model\.gguf, which is not there"):
        repair(store, find_damage(store))
    assert repair(store, find_damage(store), tmp_path / "elsewhere.gguf") == []


def test_a_path_that_is_like_a_hub_id_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "model", "qwen3_moe", **SMALL).path
    monkeypatch.chdir(tmp_path)
    store = damage(quantize(f"model/{path.name}", tmp_path / "store"))
    assert has_known_source(store)
    path.rename(tmp_path / "elsewhere.gguf")
    assert not has_known_source(store)


def test_a_file_of_the_hub_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "repository", "qwen3_moe", **SMALL).path
    path.rename(path.with_name("tiny-Q4_K_M.gguf"))
    with hub_in_use(path.parent, tmp_path / "hub", monkeypatch):
        made = quantize("org/tiny:Q4_K_M", tmp_path / "store")
        before = content(made)
        store = damage(made)
        assert (store.source, store.revision) == ("org/tiny:Q4_K_M", COMMIT)
        assert repair(store, find_damage(store)) == []
        assert content(made) == before
