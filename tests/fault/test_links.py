"""Symbolic links in a model folder: followed where one user owns the link and what it leads to, or on request."""

import shutil
from pathlib import Path

import pytest

from offload_moe.checkpoint import links
from offload_moe.checkpoint.source import resolve_source
from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError
from offload_moe.store import Store, is_store
from tests.support.checkpoints import write_checkpoint

STRANGER = 4242


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_checkpoint(folder, num_hidden_layers=2)
    return folder


@pytest.fixture
def linked(whole: Path, tmp_path: Path) -> Path:
    """A folder of nothing but links to files elsewhere."""
    real, folder = tmp_path / "disk", tmp_path / "model"
    shutil.copytree(whole, real)
    folder.mkdir()
    for path in real.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def owned_by(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Name of a file or link -> whose it is, instead of whose it really is."""
    owners: dict[str, int] = {}
    real = links._owner
    monkeypatch.setattr(links, "_owner", lambda path: owners.get(str(path), real(path)))
    return owners


def same_store(one: Path, other: Path) -> bool:
    return [path.read_bytes() for path in sorted(one.iterdir()) if path.name != "store.json"] == [
        path.read_bytes() for path in sorted(other.iterdir()) if path.name != "store.json"
    ]


def test_links_to_files_of_the_same_user_are_followed(linked: Path, whole: Path, tmp_path: Path) -> None:
    quantize(linked, tmp_path / "store", codec="bf16")
    quantize(whole, tmp_path / "plain", codec="bf16")
    assert same_store(tmp_path / "store", tmp_path / "plain")


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-*.safetensors", "model.safetensors.index.json"])
def test_a_link_to_a_strangers_file_needs_the_users_word(
    linked: Path, tmp_path: Path, owned_by: dict[str, int], name: str
) -> None:
    (target,) = (tmp_path / "disk").glob(name)
    owned_by[str(target)] = STRANGER
    with pytest.raises(CheckpointError, match=rf"{target.name} is a link to {target}.*--follow-links"):
        quantize(linked, tmp_path / "store", codec="bf16")
    assert not (tmp_path / "store").exists()
    quantize(linked, tmp_path / "store", codec="bf16", follow_links=True)
    assert len(Store.open(tmp_path / "store").layers) == 2


def test_a_strangers_link_to_the_users_file_is_not_followed(
    linked: Path, tmp_path: Path, owned_by: dict[str, int]
) -> None:
    owned_by[str(linked)] = owned_by[str(linked / "config.json")] = STRANGER
    with pytest.raises(CheckpointError, match=r"config\.json is a link"):
        resolve_source(linked)


def test_another_users_folder_with_links_to_files_of_that_user_is_read(
    linked: Path, tmp_path: Path, owned_by: dict[str, int]
) -> None:
    for path in (linked, *linked.iterdir(), *(tmp_path / "disk").iterdir()):
        owned_by[str(path)] = STRANGER
    assert resolve_source(linked).folder == linked


def test_every_link_of_a_chain_is_looked_at(linked: Path, tmp_path: Path, owned_by: dict[str, int]) -> None:
    between = tmp_path / "between"
    between.symlink_to("disk")
    (tmp_path / "again").symlink_to(tmp_path / "between" / "config.json")
    (linked / "config.json").unlink()
    (linked / "config.json").symlink_to("../again")
    assert resolve_source(linked).folder == linked
    owned_by[str(between)] = STRANGER
    with pytest.raises(CheckpointError, match=r"config\.json is a link to .*disk/config\.json"):
        resolve_source(linked)
    owned_by[str(between)] = links.ROOT_USER
    assert resolve_source(linked).folder == linked


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00001-of-*.safetensors"])
def test_a_link_that_leads_nowhere_is_named(linked: Path, tmp_path: Path, name: str) -> None:
    if name == "tokenizer.json":
        (linked / name).symlink_to(tmp_path / "gone.json")
    else:
        next((tmp_path / "disk").glob(name)).unlink()
    with pytest.raises(CheckpointError, match=r"leads nowhere: \S+ is a link to .*No such file.*Bring that back"):
        quantize(linked, tmp_path / "store", follow_links=True)


def test_links_in_a_circle_are_named(linked: Path) -> None:
    (linked / "tokenizer.json").symlink_to(linked / "vocab.json")
    (linked / "vocab.json").symlink_to(linked / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"leads nowhere: .*symbolic links"):
        resolve_source(linked)


def test_weights_that_lead_nowhere_are_not_taken_for_missing(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(whole / "config.json", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "unplugged" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors leads nowhere"):
        resolve_source(tmp_path / "model")


def test_the_folder_itself_may_be_a_link(whole: Path, tmp_path: Path, owned_by: dict[str, int]) -> None:
    (tmp_path / "model").symlink_to(whole)
    owned_by[str(tmp_path / "model")] = STRANGER
    assert is_store(quantize(tmp_path / "model", tmp_path / "store", codec="bf16"))


@pytest.fixture
def snapshot(whole: Path, tmp_path: Path) -> Path:
    """A folder as the hub's cache has it: links into `blobs` two levels above."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(whole.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_the_hubs_cache_is_one_folder(snapshot: Path, tmp_path: Path, owned_by: dict[str, int]) -> None:
    for path in (snapshot.parent.parent / "blobs").iterdir():
        owned_by[str(path)] = STRANGER
    assert is_store(quantize(snapshot, tmp_path / "store", codec="bf16"))


def test_the_blobs_of_the_hubs_cache_may_be_elsewhere(snapshot: Path, tmp_path: Path, owned_by: dict[str, int]) -> None:
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "big-disk")
    blobs.symlink_to(tmp_path / "big-disk")
    assert is_store(quantize(snapshot, tmp_path / "store", codec="bf16"))
    owned_by[str(tmp_path / "big-disk" / "0")] = STRANGER
    with pytest.raises(CheckpointError, match="--follow-links"):
        resolve_source(snapshot)
