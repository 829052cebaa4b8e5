"""The expert store: what quantize writes, Store reads, and nothing else is let in."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.convert.quantize import quantize
from offload_moe.convert.repair import find_damage
from offload_moe.errors import StoreCorrupt, StoreError, StoreVersion
from offload_moe.quant import get_codec
from offload_moe.store import Store, is_store
from tests.support.checkpoints import write_checkpoint
from tests.support.stores import check_all


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and its store with quantized experts and quantized linears."""
    folder = tmp_path_factory.mktemp("store")
    write_checkpoint(folder / "model", attention_bias=True)
    (folder / "model" / "tokenizer.json").write_text("{}")
    (folder / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model" / "modeling_evil.py").write_text("raise SystemExit")
    return folder / "model", quantize(
        folder / "model", folder / "store", codec="int8", dense_codec="nf4", scales="absmax"
    )


@pytest.fixture
def store(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folders[1], tmp_path / "store"))


def test_every_record_decodes_to_its_expert(folders: tuple[Path, Path]) -> None:
    store, codec = Store.open(folders[1]), get_codec("int8")
    with Checkpoint(folders[0]) as checkpoint:
        for ordinal, layer in enumerate(checkpoint.layers):
            assert store.layers[ordinal].shape == layer.shape
            for expert in range(layer.num_experts):
                expected = codec.encode(layer.shape, checkpoint.expert(ordinal, expert))
                assert torch.equal(store.read_expert(ordinal, expert), expected)


def test_records_lie_aligned_where_the_table_says(folders: tuple[Path, Path]) -> None:
    store = Store.open(folders[1])
    for layer in range(len(store.layers)):
        for expert in range(store.num_experts):
            record = store.record(layer, expert)
            assert record.offset % 4096 == record.num_bytes % 4096 == 0
            data = record.path.read_bytes()[record.offset : record.offset + record.num_bytes]
            assert zlib.crc32(data) == record.checksum
            with safe_open(record.path, "pt") as file:
                assert file.get_tensor(f"layers.{layer}.experts.{expert}").numpy().tobytes() == data


def test_dense_weights_are_the_source_or_a_record(folders: tuple[Path, Path]) -> None:
    store, codec = Store.open(folders[1]), get_codec("nf4")
    quantized = {name for name, entry in store.dense.items() if entry.quantized}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in quantized} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "lm_head",
    }
    with Checkpoint(folders[0]) as checkpoint:
        for entry, tensor in store.dense_tensors():
            module = entry.name.rpartition(".")[0]
            if entry.quantized is None:
                assert torch.equal(tensor, checkpoint.dense_tensor(entry.name))
                assert tensor.dtype == torch.bfloat16
            else:
                parts = {p: checkpoint.dense_tensor(f"{module}.{p}") for p in entry.quantized.module_shapes()}
                assert ("bias" in parts) == (f"{module}.bias" in checkpoint.dense)
                assert torch.equal(tensor, codec.encode(entry.quantized, parts))
        biases = {name for name in checkpoint.dense if name.endswith("_proj.bias")}
        assert biases
        assert not biases & set(store.dense)
        assert set(checkpoint.dense) - set(store.dense) == biases


def test_small_files_come_along_and_code_does_not(folders: tuple[Path, Path]) -> None:
    names = {path.name for path in folders[1].iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "store.json"} <= names
    assert not any(name.endswith((".py", ".part", ".journal", ".index.json")) for name in names)


def test_verify_reads_everything(folders: tuple[Path, Path]) -> None:
    reports: list[tuple[object, ...]] = []
    assert not find_damage(Store.open(folders[1]), lambda *report: reports.append(report))
    files = [path for path in folders[1].rglob("*") if path.is_file() and path.name != "store.json"]
    num_bytes = sum(path.stat().st_size for path in files)
    assert reports[-1] == ("Verifying", num_bytes, num_bytes)


def test_is_store(folders: tuple[Path, Path]) -> None:
    assert is_store(folders[1])
    assert not is_store(folders[0])
    assert not is_store(folders[0] / "nowhere")


def test_not_a_store(folders: tuple[Path, Path]) -> None:
    with pytest.raises(StoreError, match=r"is not an expert store: it has no store\.json"):
        Store.open(folders[0])


def edit(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make its own checksum right again."""
    path = store / "store.json"
    document = json.loads(path.read_text())
    change(document)
    document.pop("checksum", None)
    document["checksum"] = zlib.crc32(json.dumps(document, sort_keys=True).encode())
    path.write_text(json.dumps(document))


def test_an_edit_that_changes_nothing_is_fine(store: Path) -> None:
    edit(store, lambda document: None)
    check_all(Store.open(store))


def test_another_version(store: Path) -> None:
    edit(store, lambda document: document.update(version=5))
    with pytest.raises(StoreVersion, match="format version 5, this program reads versions 1 to 4"):
        Store.open(store)


def test_not_our_json(store: Path) -> None:
    (store / "store.json").write_text('{"format": "something else"}')
    with pytest.raises(StoreError, match="does not describe an expert store"):
        Store.open(store)


def set_at(document: Any, path: list[Any], value: object) -> None:
    for step in path[:-1]:
        document = document[step]
    document[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["files", 0, 0], "../dense-00001.safetensors"),
        (["files", 0, 0], "/etc/passwd"),
        (["files", 0, 3], "columns"),
        (["files", 0, 3], None),
        (["files", 1, 0], "dense-00001.safetensors"),
        (["files", 1, 0], "dense-00001-panels.safetensors"),
        (["metadata", 0, 0], "../config.json"),
        (["metadata", 0, 0], ".."),
        (["experts", 0, 0], 99),
        (["experts", 0, 0], -1),
        (["experts", 0, 1], 4095),
        (["experts", 0, 1], 1 << 40),
        (["experts", 0, 1], True),
        (["experts", 0], [0, 0]),
        (["experts"], []),
        (["layers"], []),
        (["layers", 0, "name"], "mtp.model.layers.0.mlp.experts"),
        (["layers", 0, "num_experts"], 10**9),
        (["layers", 0, "num_experts"], 3),
        (["layers", 0, "record_bytes"], 0),
        (["layers", 0, "record_bytes"], 4096.0),
        (["layers", 0, "shape", "matrices"], []),
        (["layers", 0, "shape", "matrices", 0, 1], 10**6),
        (["layers", 0, "shape", "matrices", 0, 1], "48"),
        (["layers", 0, "shape", "matrices", 0, 1], 47),
        (["layers", 0, "shape", "matrices", 0, 0], "down_proj"),
        (["layers", 0, "shape", "is_transposed"], 1),
        (["dense", 0, "dtype"], "F4"),
        (["dense", -1, "shape"], [10**9]),
        (["dense", -1, "shape"], [-4, -8]),
        (["dense", 0, "quantized", "matrices", 0, 1], 10**6),
        (["dense", 1, "name"], "lm_head.weight"),
        (["codec"], None),
        (["revision"], 7),
    ],
)
def test_a_manifest_that_lies_is_refused(store: Path, path: list[Any], value: object) -> None:
    edit(store, lambda document: set_at(document, path, value))
    with pytest.raises(StoreCorrupt):
        Store.open(store)


def test_a_codec_that_nothing_has_is_named(store: Path) -> None:
    edit(store, lambda document: set_at(document, ["codec"], "nf5"))
    with pytest.raises(StoreError, match="is in the codec 'nf5', which is neither built in nor") as caught:
        Store.open(store)
    assert not isinstance(caught.value, StoreCorrupt)  # what is missing may be a package


@pytest.mark.parametrize("key", ["source", "layers", "files", "experts", "dense", "metadata", "codec"])
def test_a_manifest_without_a_field_is_refused(store: Path, key: str) -> None:
    edit(store, lambda document: document.pop(key))
    with pytest.raises(StoreCorrupt, match=key):
        Store.open(store)
