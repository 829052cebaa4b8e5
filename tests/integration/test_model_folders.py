"""Which files of a model folder are read: those that transformers would load, and a notice of the rest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offload_moe.checkpoint.weight_files import choose_weights
from offload_moe.errors import CheckpointError
from offload_moe.plan import Machine, make_plan
from tests.support.checkpoints import write_checkpoint
from tests.support.plan import GIB
from tests.support.reference import (
    converted,
    edit_config,
    expected_logits,
    read_tensors,
    stored_logits,
    write_index,
    write_single,
)

pytestmark = pytest.mark.filterwarnings("ignore")
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_checkpoint(folder, shard_size="1GB", num_hidden_layers=2)
    return folder


@pytest.fixture
def single(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def split(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write tensors as two shards; returns the weight map of their index."""
    names = sorted(tensors)
    halves = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    for file_name, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file_name, metadata={"format": "pt"})
    return {name: file_name for file_name, half in halves.items() for name in half}


@pytest.fixture
def sharded(single: Path) -> tuple[Path, dict[str, str]]:
    weight_map = split(single, read_tensors(single))
    (single / "model.safetensors").unlink()
    write_index(single, weight_map)
    return single, weight_map


def other_values(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}


def agree(folder: Path, tmp_path: Path) -> list[str]:
    """Convert, compare with transformers, and return the notices about the folder."""
    notices = converted(folder, tmp_path / "store")
    expected = expected_logits(folder)
    assert expected.std() > 1e-3
    torch.testing.assert_close(stored_logits(tmp_path / "store"), expected, atol=1e-5, rtol=1e-5)
    return [notice for notice in notices if "tokenizer" not in notice]


def test_a_single_file_goes_before_an_index_with_its_shards(single: Path, tmp_path: Path) -> None:
    write_index(single, split(single, other_values(read_tensors(single))))
    (notice,) = agree(single, tmp_path)
    assert notice == (
        f"Not used, as transformers reads model.safetensors: {FIRST}, {SECOND}, model.safetensors.index.json."
    )
    assert make_plan(single, Machine(ram_bytes=GIB)).checkpoint_bytes == (single / "model.safetensors").stat().st_size


@pytest.mark.parametrize("index", ["{", '{"weight_map": {}}', '{"weight_map": {"x": "../../gone.safetensors"}}'])
def test_what_an_unused_index_says_does_not_matter(single: Path, tmp_path: Path, index: str) -> None:
    (single / "model.safetensors.index.json").write_text(index)
    (notice,) = agree(single, tmp_path)
    assert "model.safetensors.index.json" in notice


def test_shards_of_an_older_save_beside_an_index_are_not_read(
    sharded: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, _ = sharded
    old = "model-00001-of-00003.safetensors"
    save_file(other_values(load_file(folder / FIRST)), folder / old)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (notice,) = agree(folder, tmp_path)
    assert notice == f"Not used, as transformers reads model.safetensors.index.json: {old}, pytorch_model.bin."
    plan = make_plan(folder, Machine(ram_bytes=GIB))
    assert plan.checkpoint_bytes == sum((folder / name).stat().st_size for name in (FIRST, SECOND))


def test_tensors_that_the_index_does_not_list_are_read(sharded: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, weight_map = sharded
    del weight_map[EMBEDDING]
    write_index(folder, weight_map)
    assert agree(folder, tmp_path) == []


def test_a_tensor_in_another_shard_than_the_index_says_is_read(
    sharded: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, weight_map = sharded
    weight_map[EMBEDDING] = FIRST if weight_map[EMBEDDING] == SECOND else SECOND
    write_index(folder, weight_map)
    (notice,) = agree(folder, tmp_path)
    assert notice == f"In other files than model.safetensors.index.json says, and read from there: {EMBEDDING}."


def test_a_tensor_that_only_the_index_has_is_named(sharded: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, weight_map = sharded
    write_index(folder, weight_map | {"model.old": FIRST})
    (notice,) = agree(folder, tmp_path)
    assert notice == "model.safetensors.index.json lists tensors that are in no file: model.old."


def test_a_needed_tensor_that_only_the_index_has_is_an_error(
    sharded: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, weight_map = sharded
    path = folder / weight_map[EMBEDDING]
    save_file({name: tensor for name, tensor in load_file(path).items() if name != EMBEDDING}, path)
    with pytest.raises(CheckpointError, match=f"no tensor brings {EMBEDDING}"):
        converted(folder, tmp_path / "store")


def test_of_a_tensor_in_two_shards_the_last_is_read(sharded: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, weight_map = sharded
    assert weight_map[EMBEDDING] == FIRST
    tensors = load_file(folder / SECOND)
    save_file(tensors | {EMBEDDING: load_file(folder / FIRST)[EMBEDDING].flip(0).contiguous()}, folder / SECOND)
    notices = agree(folder, tmp_path)
    assert f"In several files, the last of which is read, as transformers does: {EMBEDDING}." in notices


def test_a_total_size_that_is_wrong_does_not_matter(sharded: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, weight_map = sharded
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 5 << 40}, "weight_map": weight_map}))
    assert agree(folder, tmp_path) == []
    assert make_plan(folder, Machine(ram_bytes=GIB)).checkpoint_bytes < 1 << 20


def test_shards_that_are_gone_are_named(sharded: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, _ = sharded
    for name in (FIRST, SECOND):
        (folder / name).rename(folder / name.replace("00002", "00003"))
    with pytest.raises(CheckpointError, match=rf"index\.json names {FIRST}, {SECOND}, which are not there\. Download"):
        converted(folder, tmp_path / "store")


def test_the_config_may_name_the_file(single: Path, tmp_path: Path) -> None:
    tensors = read_tensors(single)
    save_file(other_values(tensors), single / "special.safetensors", metadata={"format": "pt"})
    edit_config(single, transformers_weights="special.safetensors")
    (notice,) = agree(single, tmp_path)
    assert notice == "Not used, as transformers reads special.safetensors: model.safetensors."


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hosts.safetensors", "weights.bin", 5])
def test_a_config_that_names_no_safetensors_of_the_folder_is_refused(single: Path, name: object) -> None:
    edit_config(single, transformers_weights=name)
    with pytest.raises(CheckpointError, match=r"leads out of the checkpoint folder|is neither a safetensors file"):
        choose_weights(single)


def test_a_single_file_under_another_name_is_named(single: Path, tmp_path: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"only weights\.safetensors\. .* rename a single file"):
        converted(single, tmp_path / "store")


def test_shards_may_lie_in_a_folder_below(sharded: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, weight_map = sharded
    (folder / "parts").mkdir()
    for name in (FIRST, SECOND):
        (folder / name).rename(folder / "parts" / name)
    write_index(folder, {tensor: f"./parts/{name}" for tensor, name in weight_map.items()})
    assert agree(folder, tmp_path) == []


ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize("names", [["adapter_config.json"], ["adapter_model.safetensors"], ["adapter_model.bin"]])
@pytest.mark.parametrize("has_model", [True, False])
def test_an_adapter_is_refused_by_name(single: Path, tmp_path: Path, names: list[str], has_model: bool) -> None:
    from offload_moe import load

    for name in names:
        (single / name).write_text(json.dumps(ADAPTER))
    if not has_model:
        (single / "config.json").unlink()
        (single / "model.safetensors").unlink()
    match = rf"holds a PEFT adapter such as LoRA \({names[0]}\).*merge_and_unload"
    for attempt in (
        lambda: converted(single, tmp_path / "store"),
        lambda: load(single),
        lambda: make_plan(single, Machine(ram_bytes=GIB)),
    ):
        with pytest.raises(CheckpointError, match=match):
            attempt()


def test_an_adapter_that_came_after_a_conversion_is_refused(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload_moe import load

    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    load(single, codec="bf16", context=64).close()
    (single / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with pytest.raises(CheckpointError, match="adapter_config"):
        load(single, codec="bf16", context=64)


def test_a_notice_of_the_conversion_is_the_models_too(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload_moe import load

    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    write_single(single, read_tensors(single))
    (single / "pytorch_model.bin").write_bytes(b"never read")
    with load(single, codec="bf16", context=64) as model:
        assert model.notices == ["Not used, as transformers reads model.safetensors: pytorch_model.bin."]


def test_another_index_over_the_same_files_is_another_model(
    sharded: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload_moe import load

    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    folder, weight_map = sharded
    other = {FIRST: "other-1.safetensors", SECOND: "other-2.safetensors"}
    for name, target in other.items():
        save_file(other_values(load_file(folder / name)), folder / target, metadata={"format": "pt"})

    def embedding() -> torch.Tensor:
        with load(folder, codec="bf16", context=64) as model:
            return model.store.read_dense(EMBEDDING)

    before = embedding()
    write_index(folder, {tensor: other[name] for tensor, name in weight_map.items()})
    assert embedding().equal(before.flip(0))
