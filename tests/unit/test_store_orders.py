"""Records in panels on the disk (version 2) and in rows (version 1): the same bytes for everything that reads rows."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload_moe import load
from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.experts import find_experts
from offload_moe.checkpoint.skeleton import build_skeleton
from offload_moe.convert import jobs
from offload_moe.convert.quantize import quantize
from offload_moe.convert.repair import find_damage, repair
from offload_moe.decode.mlp import FusedMLP
from offload_moe.errors import StoreCorrupt
from offload_moe.memory.arena import Arena
from offload_moe.memory.disk import DiskMover, RecordOf, RepackingOf
from offload_moe.native.kernels import PanelOrder, SlotTable
from offload_moe.quant import get_codec
from offload_moe.quant.panels import to_panels
from offload_moe.store import Store
from offload_moe.store.upgrade import upgrade
from tests.support.checkpoints import tiny_config, write_checkpoint
from tests.support.quantized import write_mxfp4_checkpoint
from tests.support.stores import assert_same_stores, check_all, to_version_1

CODECS = [("nf4", "int8"), ("int8", "nf4"), ("mxfp4", "bf16"), ("bf16", "int8"), ("nf4", "bf16")]
RAGGED: dict[str, Any] = {"vocab_size": 70, "moe_intermediate_size": 25, "hidden_size": 40, "attention_bias": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gate and up rows of 25, and a head of 70: no multiples of 16."""
    folder = tmp_path_factory.mktemp("orders") / "model"
    write_checkpoint(folder, num_hidden_layers=2, **RAGGED)
    return folder


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mxfp4_checkpoint(tmp_path_factory.mktemp("mxfp4"), num_hidden_layers=2)[0]


@pytest.fixture(scope="module")
def stores(checkpoint: Path, mxfp4: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store by its experts' and its linears' codec."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        f"{codec}-{dense}": quantize(
            mxfp4 if codec == "mxfp4" else checkpoint,
            folder / f"{codec}-{dense}",
            codec=codec,
            dense_codec=dense,
            scales="absmax",
        )
        for codec, dense in CODECS
    }


def on_disk(store: Store, layer: int, expert: int) -> Tensor:
    record = store.record(layer, expert)
    data = record.path.read_bytes()[record.offset : record.offset + record.num_bytes]
    assert zlib.crc32(data) == record.checksum
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["nf4-int8", "int8-nf4", "bf16-int8"])
def test_rows_are_the_codecs_own_bytes(name: str, stores: dict[str, Path], checkpoint: Path) -> None:
    """nf4: bitsandbytes encodes what is compared."""
    store = Store.open(stores[name])
    experts, linears = get_codec(store.codec), get_codec(store.dense_codec)
    with Checkpoint(checkpoint) as source:
        for layer, description in enumerate(source.layers):
            for expert in range(description.num_experts):
                expected = experts.encode(description.shape, source.expert(layer, expert))
                assert torch.equal(store.read_expert(layer, expert), expected)
                assert torch.equal(on_disk(store, layer, expert), expected) == (store.codec == "bf16")
                assert torch.equal(on_disk(store, layer, expert), store.read_expert(layer, expert, "panels"))
        quantized = {name: entry.quantized for name, entry in store.dense.items() if entry.quantized}
        assert any(shape.biases for shape in quantized.values())
        for tensor, shape in quantized.items():
            module = tensor.removesuffix(".weight")
            parts = {part: source.dense_tensor(f"{module}.{part}") for part in shape.module_shapes()}
            expected = linears.encode(shape, parts)
            assert torch.equal(store.read_dense(tensor), expected)
            PanelOrder(store.dense_codec, shape, linears.layout(shape)).to_panels(expected)
            assert torch.equal(store.read_dense(tensor, "panels"), expected)


def test_panels_on_the_disk_are_those_of_the_definition(stores: dict[str, Path]) -> None:
    """Planes of an expert, part by part, through the slow reference."""
    for name, scales in (("nf4-int8", "absmax"), ("int8-nf4", "scales"), ("mxfp4-bf16", "scales")):
        store = Store.open(stores[name])
        shape = store.layers[1].shape
        layout = get_codec(store.codec).layout(shape)
        rows, panels = store.read_expert(1, 2), on_disk(store, 1, 2)
        expected = rows.clone()
        for matrix, num_parts in zip(shape.matrices, (2, 1), strict=True):
            codes = layout.view(rows, f"{matrix.name}.codes").view(torch.int32).chunk(num_parts)
            layout.view(expected, f"{matrix.name}.codes").view(torch.int32).flatten().copy_(
                torch.cat([to_panels(part) for part in codes])
            )
            per_row = layout.view(rows, f"{matrix.name}.{scales}").view(matrix.out_features, -1).chunk(num_parts)
            layout.view(expected, f"{matrix.name}.{scales}").copy_(torch.cat([to_panels(part) for part in per_row]))
        assert torch.equal(panels, expected)
        assert not torch.equal(panels, rows)


@pytest.mark.parametrize("name", [f"{codec}-{dense}" for codec, dense in CODECS])
def test_both_versions_read_and_answer_alike(name: str, stores: dict[str, Path], tmp_path: Path) -> None:
    older = to_version_1(Path(shutil.copytree(stores[name], tmp_path / "older")))
    check_all(Store.open(older))
    assert_same_stores(older, stores[name])
    changed = [file.name for file in Store.open(older).files_in_rows()]
    assert [name.partition("-")[0] for name in changed] == [
        prefix for prefix, codec in zip(("dense", "experts"), reversed(name.split("-")), strict=True) if codec != "bf16"
    ]
    assert not Store.open(stores[name]).files_in_rows()
    upgraded = Path(shutil.copytree(older, tmp_path / "upgraded"))
    upgrade(upgraded)
    answers = []
    for store, options in ((older, {}), (stores[name], {}), (upgraded, {}), (stores[name], {"exact": True})):
        with load(store, fast_path=not options, **options) as model:
            tokens = torch.tensor([[3, 5, 7, 11, 13]])
            answers.append(model.hf(tokens).logits)
            assert answers[0].abs().sum() > 0
    assert torch.equal(answers[1], answers[0])
    assert torch.equal(answers[2], answers[0])
    with load(older, exact=True, fast_path=False) as model:
        assert torch.equal(model.hf(tokens).logits, answers[3])


def test_records_are_repacked_only_where_another_order_is_read(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = to_version_1(Path(shutil.copytree(stores["nf4-int8"], tmp_path / "older")))
    found: list[bool | None] = []

    class Mover(DiskMover):
        def __init__(self, arena: Arena, table: SlotTable, record_of: RecordOf, repacking_of: RepackingOf) -> None:
            repacking = repacking_of(3)
            found.append(None if repacking is None else repacking.to_panels)
            super().__init__(arena, table, record_of, repacking_of)

    monkeypatch.setattr("offload_moe.engine.build.DiskMover", Mover)
    for store in (older, stores["nf4-int8"]):
        for is_exact in (False, True):
            load(store, exact=is_exact).close()
    assert found == [True, None, None, False]


def test_records_of_fused_mlps_are_the_same(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 40, "shared_expert_intermediate_size": 25}
    write_checkpoint(tmp_path / "model", "qwen2_moe", **sizes)
    store = quantize(tmp_path / "model", tmp_path / "store", codec="nf4", dense_codec="int8")
    older = to_version_1(Path(shutil.copytree(store, tmp_path / "older")))
    found = []
    for path in (older, store):
        with load(path) as model:
            fused = [module for module in model.hf.modules() if isinstance(module, FusedMLP)]
            records = [record for module in fused for record in module.buffers()]
            found.append([*records, model.hf(torch.tensor([[3, 5, 7]])).logits])
    assert len(found[0]) == 2 * 3 + 1
    assert all(map(torch.equal, *found))


def test_damaged_pieces_are_made_again_in_the_order_of_their_file(
    checkpoint: Path, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of matrices that are encoded by runs of rows, and in a store that is half upgraded."""
    monkeypatch.setattr(jobs, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(jobs, "RUN_BYTES", 700)
    by_runs = quantize(checkpoint, tmp_path / "runs", codec="nf4", dense_codec="int8", scales="absmax")
    assert_same_stores(by_runs, stores["nf4-int8"])
    older = to_version_1(Path(shutil.copytree(by_runs, tmp_path / "older")))
    for folder in (by_runs, older):
        store = Store.open(folder)
        places = [store.record(1, 3).offset, store.dense["lm_head.weight"].place.offset]
        for path, offset in zip(sorted(folder.glob("*.safetensors"), reverse=True), places, strict=True):
            original = path.read_bytes()
            data = bytearray(original)
            data[offset + 9] ^= 1
            path.write_bytes(data)
            damages = find_damage(store)
            assert len(damages) == 1
            assert repair(store, damages, checkpoint) == []
            assert path.read_bytes() == original


@pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
def test_the_name_of_a_first_matrix_says_whether_it_has_a_gate() -> None:
    """Of decorated modules, with a gate and without, and of every adapter."""
    adapted = ("dbrx", "jetmoe", "llama4_text", "longcat_flash", "nllb-moe", "step3p7", "switch_transformers")
    found = {}
    for family in ("qwen3_moe", "gpt_oss", "nemotron_h", *adapted):
        for layer in find_experts(build_skeleton(tiny_config(family))):
            assert layer.shape.has_gate == layer.contract.has_gate
            found[family] = layer.shape.has_gate
    assert sorted(family for family in found if not found[family]) == ["nemotron_h", "nllb-moe", "switch_transformers"]


def edit(store: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    document = json.loads((store / "store.json").read_text())
    change(document)
    del document["checksum"]
    document["checksum"] = zlib.crc32(json.dumps(document, sort_keys=True).encode())
    (store / "store.json").write_text(json.dumps(document))
    return store


def test_panels_that_a_codec_does_not_have_are_refused(stores: dict[str, Path], tmp_path: Path) -> None:
    store = Path(shutil.copytree(stores["bf16-int8"], tmp_path / "store"))
    edit(store, lambda document: document["files"][1].__setitem__(3, "panels"))
    with pytest.raises(StoreCorrupt, match=r"experts-00001\.safetensors has no records that have panels"):
        Store.open(store)


@pytest.mark.parametrize("version", [1, 2])
def test_a_version_has_its_own_fields(version: int, stores: dict[str, Path], tmp_path: Path) -> None:
    store = Path(shutil.copytree(stores["nf4-int8"], tmp_path / "store"))
    if version == 2:
        edit(store, lambda document: document["files"][0].pop())
    else:
        edit(store, lambda document: document.update(version=1))
    with pytest.raises(StoreCorrupt):
        Store.open(store)
