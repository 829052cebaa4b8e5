"""A damaged store is refused by the name of the file and of what is damaged in it."""

import shutil
from pathlib import Path

import pytest

from offload_moe.convert.quantize import quantize
from offload_moe.errors import StoreCorrupt
from offload_moe.store import Store
from tests.support.checkpoints import write_checkpoint
from tests.support.stores import check_all


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_checkpoint(folder / "model")
    return quantize(folder / "model", folder / "store", codec="bf16")


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def flip(path: Path, offset: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_in_an_expert(store: Path) -> None:
    record = Store.open(store).record(1, 2)
    flip(record.path, record.offset + 100)
    damaged = Store.open(store)
    with pytest.raises(StoreCorrupt, match=r"experts-00001\.safetensors: expert 2 of layer 1 .* its checksum"):
        damaged.read_expert(1, 2)
    with pytest.raises(StoreCorrupt, match="expert 2 of layer 1"):
        check_all(damaged)
    damaged.read_expert(1, 1)


def test_a_flipped_bit_in_a_dense_tensor(store: Path) -> None:
    place = Store.open(store).dense["model.norm.weight"].place
    flip(store / "dense-00001.safetensors", place.offset)
    with pytest.raises(StoreCorrupt, match=r"dense-00001\.safetensors: model\.norm\.weight"):
        Store.open(store).read_dense("model.norm.weight")


@pytest.mark.parametrize("name", ["dense-00001.safetensors", "experts-00001.safetensors"])
def test_a_flipped_bit_in_a_header(store: Path, name: str) -> None:
    flip(store / name, 40)
    with pytest.raises(StoreCorrupt, match=f"{name}: the header"):
        check_all(Store.open(store))


def test_a_flipped_bit_in_a_small_file(store: Path) -> None:
    flip(store / "config.json", 20)
    with pytest.raises(StoreCorrupt, match=r"config\.json"):
        check_all(Store.open(store))


def test_no_bit_of_the_manifest_flips_unnoticed(store: Path) -> None:
    manifest = store / "store.json"
    original = manifest.read_bytes()
    for offset in range(0, len(original), 37):
        flip(manifest, offset, bit=0)
        if manifest.read_bytes().split() != original.split():  # white space carries nothing
            with pytest.raises(StoreCorrupt):
                Store.open(store)
        manifest.write_bytes(original)


@pytest.mark.parametrize("name", ["dense-00001.safetensors", "experts-00001.safetensors", "config.json"])
def test_a_truncated_or_missing_file(store: Path, name: str) -> None:
    size = (store / name).stat().st_size
    with (store / name).open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(StoreCorrupt, match=f"{name} has {size - 1} bytes, {size} were written"):
        Store.open(store)
    (store / name).unlink()
    with pytest.raises(StoreCorrupt, match=f"{name} is missing"):
        Store.open(store)


def test_a_file_truncated_while_open(store: Path) -> None:
    opened = Store.open(store)
    record = opened.record(2, 3)
    with record.path.open("r+b") as file:
        file.truncate(record.offset + 5)
    with pytest.raises(StoreCorrupt, match="ends inside expert 3 of layer 2"):
        opened.read_expert(2, 3)


def test_garbage_for_a_manifest(store: Path) -> None:
    (store / "store.json").write_bytes(b"\xff\x00" * 20)
    with pytest.raises(StoreCorrupt, match=r"store\.json is damaged"):
        Store.open(store)
