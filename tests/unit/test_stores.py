"""What is installed: found, named, checked, repaired and deleted, and nothing else touched."""

import fcntl
import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_moe.convert.quantize import quantize
from offload_moe.convert.repair import find_damage, repair, restore_sizes
from offload_moe.convert.sources import ensure_store
from offload_moe.errors import ConfigError, StoreCorrupt, StoreError
from offload_moe.store import Store
from offload_moe.store.installed import describe, find, installed, remove, resolve
from offload_moe.store.manifest import MergedAdapter
from offload_moe.store.manifest_json import manifest_to_json, read_manifest
from offload_moe.system.locks import lock_file
from offload_moe.system.sizes import format_size
from tests.support.checkpoints import write_checkpoint
from tests.support.cli import load_cli

DEMO = "SmolLM2-135M-Instruct-MoE-01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its store."""
    root = tmp_path_factory.mktemp("made")
    write_checkpoint(root / "model")
    (root / "model" / "chat_template.jinja").write_text("{{ messages }}")
    return root / "model", quantize(root / "model", root / "store", codec="nf4", dense_codec="int8")


@pytest.fixture
def cache(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with a store, a conversion, a demo build, half a demo build, and what is none of these."""
    root = tmp_path / "cache"
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(root))
    shutil.copytree(made[1], root / "stores" / "tiny-nf4")
    conversion = root / "stores" / "half-int8"
    conversion.mkdir()
    begun = {"source": "org/half", "revision": "abc", "codec": "int8", "dense codec": "bf16"}
    (conversion / "conversion.journal").write_text(json.dumps(begun) + "\n0011")
    (conversion / "dense-00001.safetensors.part").write_bytes(b"12345")
    for name in (DEMO, f".{DEMO[:-1]}8.partial"):
        (root / "demo" / name).mkdir(parents=True)
        (root / "demo" / name / "model.safetensors").write_bytes(b"1234567")
    (root / "demo" / f"{DEMO}.lock").touch()
    (root / "stores" / "something").mkdir()
    (root / "downloads").mkdir()
    return root


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def test_what_is_installed(cache: Path, made: tuple[Path, Path]) -> None:
    found = {entry.name: entry for entry in installed()}
    assert {name: entry.kind for name, entry in found.items()} == {
        "tiny-nf4": "store",
        "half-int8": "conversion",
        DEMO: "demo",
        f".{DEMO[:-1]}8.partial": "unfinished demo",
    }
    store, conversion = found["tiny-nf4"], found["half-int8"]
    assert store.num_bytes == sum(path.stat().st_size for path in made[1].rglob("*") if path.is_file())
    assert (store.codec, store.dense_codec, store.source, store.revision) == ("nf4", "int8", "model", None)
    assert (conversion.codec, conversion.dense_codec, conversion.source, conversion.revision) == (
        *("int8", "bf16", "org/half", "abc"),
    )
    assert found[DEMO].num_bytes == 7
    assert installed(cache / "nowhere") == []


def test_a_store_that_does_not_open_is_listed_with_why(cache: Path) -> None:
    path = cache / "stores" / "tiny-nf4"
    (path / "experts-00001.safetensors").unlink()
    found = find("tiny-nf4")
    assert found.kind == "damaged store"
    assert "experts-00001.safetensors is missing" in str(found.problem)
    (cache / "stores" / "half-int8" / "conversion.journal").write_bytes(b"\xff{")
    assert find("half-int8").problem == "its journal cannot be read"


def test_a_name_is_a_path_first_and_then_an_entry(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = cache / "stores" / "tiny-nf4"
    assert resolve("tiny-nf4") == entry
    assert resolve(DEMO) == cache / "demo" / DEMO
    assert resolve(entry) == entry
    for other in ("nothing", "..", ".", "stores/tiny-nf4", "../stores/tiny-nf4", "org/model", ""):
        assert resolve(other) == Path(other)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-nf4").mkdir()
    assert resolve("tiny-nf4") == Path("tiny-nf4")


def test_a_model_loads_by_its_name(cache: Path) -> None:
    settings: dict[str, Any] = {"codec": "nf4", "dense_codec": "bf16", "revision": None, "token": None}
    assert ensure_store("tiny-nf4", **settings) == cache / "stores" / "tiny-nf4"


@pytest.mark.parametrize("name", ["tiny-nf4", "half-int8", DEMO, f".{DEMO[:-1]}8.partial"])
def test_removing_leaves_the_rest(cache: Path, name: str) -> None:
    before = {entry.name for entry in installed()}
    remove(find(name))
    assert {entry.name for entry in installed()} == before - {name}
    assert not find_path(cache, name)


def find_path(cache: Path, name: str) -> list[Path]:
    return [folder / name for folder in (cache / "stores", cache / "demo") if (folder / name).exists()]


def test_removing_from_inside(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache / "stores" / "tiny-nf4")
    remove(find("."))
    assert not find_path(cache, "tiny-nf4")


def test_what_is_not_ours_is_not_found(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / DEMO).mkdir()  # like a demo build, but not in the cache
    for name in ("something", "downloads", "stores", str(cache), str(tmp_path / "photos"), str(tmp_path / DEMO)):
        with pytest.raises(StoreError, match=r"offload-moe list"):
            find(name)
    assert describe(cache / "downloads") is None


@pytest.mark.parametrize("foreign", ["thesis.docx", "notes.json", "dense-1.safetensors", "sub/config.json", "a/b/c"])
def test_files_of_others_keep_a_store_alive(cache: Path, foreign: str) -> None:
    path = cache / "stores" / "tiny-nf4"
    (path / foreign).parent.mkdir(parents=True, exist_ok=True)
    (path / foreign).write_text("mine")
    before = sorted(path.rglob("*"))
    with pytest.raises(StoreError, match="no conversion writes"):
        remove(find("tiny-nf4"))
    assert sorted(path.rglob("*")) == before


def test_links_are_not_followed(cache: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    (cache / "stores" / "linked").symlink_to(made[1])
    assert "linked" not in {entry.name for entry in installed()}
    with pytest.raises(StoreError, match="link to another folder"):
        remove(find("linked"))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").touch()
    inside = cache / "stores" / "half-int8" / "additional_chat_templates"
    inside.symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="no conversion writes"):
        remove(find("half-int8"))
    inside.unlink()
    (cache / "demo" / DEMO / "link").symlink_to(tmp_path / "outside")
    remove(find(DEMO))
    assert (tmp_path / "outside" / "kept").exists()
    assert Store.open(made[1])


def test_what_is_being_written_stays(cache: Path) -> None:
    journal = os.open(cache / "stores" / "half-int8" / "conversion.journal", os.O_RDWR)
    fcntl.flock(journal, fcntl.LOCK_EX)
    with lock_file(cache / "demo" / f"{DEMO}.lock"):
        for name in ("half-int8", DEMO):
            with pytest.raises(StoreError, match="by another process"):
                remove(find(name))
    os.close(journal)
    remove(find("half-int8"))


def test_a_deletion_that_is_killed_can_be_done_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted = 0
    unlink = os.unlink

    def fail_after_three(path: str) -> None:
        nonlocal deleted
        deleted += 1
        if deleted > 3:
            raise KeyboardInterrupt
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail_after_three)
        with pytest.raises(KeyboardInterrupt):
            remove(find("tiny-nf4"))
    remove(find("tiny-nf4"))
    assert not find_path(cache, "tiny-nf4")


def test_every_damaged_piece_is_found_and_repaired(cache: Path, made: tuple[Path, Path]) -> None:
    path = cache / "stores" / "tiny-nf4"
    original = {file.name: file.read_bytes() for file in path.iterdir()}
    store = Store.open(path)
    record = store.record(1, 2)
    flip(record.path, record.offset + 100)
    flip(path / "dense-00001.safetensors", store.dense["model.norm.weight"].place.offset)
    flip(path / "experts-00001.safetensors", 50)
    flip(path / "chat_template.jinja", 3)
    reports: list[tuple[object, ...]] = []
    damages = find_damage(store, lambda *report: reports.append(report))
    names = [damage.piece.name.partition(" (")[0] for damage in damages]
    assert names == ["the file", "the header", "model.norm.weight", "expert 2 of layer 1"]
    phase, done, total = reports[-1]
    assert phase == "Verifying"
    assert done == total != 0
    with pytest.raises(ConfigError, match="--source"):
        repair(store, damages)
    assert repair(store, damages, made[0]) == []
    assert {file.name: file.read_bytes() for file in path.iterdir()} == original


def test_another_checkpoint_repairs_nothing(cache: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "other")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "other", max_shard_size="40KB")
    store = Store.open(cache / "stores" / "tiny-nf4")
    record = store.record(0, 0)
    flip(record.path, record.offset)
    damaged = record.path.read_bytes()
    damages = find_damage(store)
    assert repair(store, damages, tmp_path / "other") == damages
    assert record.path.read_bytes() == damaged


def test_missing_and_short_files_are_repaired(cache: Path, made: tuple[Path, Path]) -> None:
    path = cache / "stores" / "tiny-nf4"
    original = {file.name: file.read_bytes() for file in path.iterdir()}
    os.truncate(path / "experts-00001.safetensors", 5000)
    (path / "config.json").unlink()
    with pytest.raises(StoreCorrupt):
        Store.open(path)
    restore_sizes(path)
    store = Store.open(path)
    assert repair(store, find_damage(store), made[0]) == []
    assert {file.name: file.read_bytes() for file in path.iterdir()} == original


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status: int = load_cli().main(arguments)
    return status, *capsys.readouterr()


def test_the_list(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = cli(capsys, "list")
    assert status == 0
    names = [line.split()[0] for line in out.splitlines()[1:]]
    assert names == [entry.name for entry in installed()]
    assert "unfinished conversion" in out
    assert "org/half@abc" in out
    assert err == f"4 in {cache}, {format_size(sum(entry.num_bytes for entry in installed()))}.\n"
    document = json.loads(cli(capsys, "list", "--json")[1])
    assert document["cache"] == str(cache)
    assert [entry["name"] for entry in document["installed"]] == [entry.name for entry in installed()]
    shutil.rmtree(cache)
    assert cli(capsys, "list")[1:] == ("", f"Nothing is installed in {cache}. Try: offload-moe chat\n")


def test_the_info(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = cli(capsys, "info", "tiny-nf4")
    assert status == 0
    assert "12 in 3 layers, nf4" in out
    document = json.loads(cli(capsys, "info", str(cache / "stores" / "tiny-nf4"), "--json")[1])
    assert document["kind"] == "store"
    assert sum(layer["num_experts"] for layer in document["layers"]) == 12
    assert document["num_checksums"] > 12
    assert document["fingerprint"] in out
    assert "unfinished conversion" in cli(capsys, "info", "half-int8")[1]
    status, out, err = cli(capsys, "info", "nothing")
    assert (status, out) == (1, "")
    assert err.startswith("error: nothing is no folder, and no name in the cache.")


def come_from(store: Path, source: str, revision: str | None, adapter: MergedAdapter | None = None) -> None:
    manifest = replace(read_manifest(store), source=source, revision=revision, adapter=adapter)
    (store / "store.json").write_text(manifest_to_json(manifest))


@pytest.mark.parametrize(
    ("source", "revision", "command"),
    [
        ("Qwen/Qwen3-30B-A3B", "ad44e777", "vllm serve Qwen/Qwen3-30B-A3B --revision ad44e777"),
        ("org/model", "a branch; rm", "vllm serve org/model --revision 'a branch; rm'"),
        ("org/model", None, None),
        ("folder", "ad44e777", None),
        ("org/model:Q4_K_M", "ad44e777", None),
        ("../model", "ad44e777", None),
    ],
)
def test_the_command_that_serves_the_source_with_vllm(
    source: str, revision: str | None, command: str | None, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    come_from(cache / "stores" / "tiny-nf4", source, revision)
    lines = cli(capsys, "info", "tiny-nf4")[1].splitlines()
    assert [line for line in lines if "vllm" in line] == ([f"with vLLM    {command}"] if command else [])
    assert json.loads(cli(capsys, "info", "tiny-nf4", "--json")[1])["vllm"] == command
    assert "vllm serve org/half --revision abc" in cli(capsys, "info", "half-int8")[1]


def test_vllm_serves_the_base_of_a_merged_adapter(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = MergedAdapter(name="mine", sha256="0" * 64)
    come_from(cache / "stores" / "tiny-nf4", "org/model", "abc", adapter)
    assert "vllm serve org/model --revision abc (without the adapter)" in cli(capsys, "info", "tiny-nf4")[1]


def test_a_store_does_not_drive_the_terminal(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = {"source": "org/\x1b[2Jhalf", "revision": None, "codec": "int8", "dense codec": "bf16"}
    (cache / "stores" / "half-int8" / "conversion.journal").write_text(json.dumps(begun) + "\n")
    for arguments in (["list"], ["info", "half-int8"]):
        out = cli(capsys, *arguments)[1]
        assert "org/[2Jhalf" in out
        assert "\x1b" not in out


def test_verify_and_repair(cache: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = cli(capsys, "verify", "tiny-nf4")
    assert status == 0
    assert "is intact:" in out
    assert "Verifying ..." in err
    record = Store.open(cache / "stores" / "tiny-nf4").record(2, 1)
    flip(record.path, record.offset + 7)
    status, out, err = cli(capsys, "verify", "tiny-nf4")
    assert (status, out.partition(" (")[0]) == (1, "experts-00001.safetensors: expert 1 of layer 2")
    assert err.endswith("add --repair --source SOURCE (the checkpoint, which was named model).\n")
    assert cli(capsys, "verify", "tiny-nf4", "--source", "x")[2].endswith("Add --repair.\n")
    status, out, err = cli(capsys, "verify", "tiny-nf4", "--repair", "--source", str(made[0]))
    assert (status, out.partition(" (")[0]) == (0, "repaired: experts-00001.safetensors: expert 1 of layer 2")
    assert err.endswith("is repaired.\n")
    assert cli(capsys, "verify", "tiny-nf4")[0] == 0


def test_a_checkpoint_in_the_cache_repairs_its_store_unasked(
    cache: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made[0], cache / "demo" / "model")
    record = Store.open(cache / "stores" / "tiny-nf4").record(2, 1)
    for arguments in ([], ["--source", "model"]):
        flip(record.path, record.offset + 7)
        assert cli(capsys, "verify", "tiny-nf4")[2].endswith("Check the disk, and add --repair.\n")
        assert cli(capsys, "verify", "tiny-nf4", "--repair", *arguments)[0] == 0
        assert cli(capsys, "verify", "tiny-nf4")[0] == 0


class Typed(io.StringIO):
    """A keyboard."""

    def isatty(self) -> bool:
        return True


def test_rm_asks_a_person(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = cache / "stores" / "tiny-nf4"
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    status, _, err = cli(capsys, "rm", "tiny-nf4")
    assert (status, path.exists(), err) == (
        1,
        True,
        f"error: {path} needs a confirmation, and stdin is not a terminal. Add --yes to delete it.\n",
    )
    for answer in ("\n", "no\n", ""):
        monkeypatch.setattr(sys, "stdin", Typed(answer))
        assert cli(capsys, "rm", "tiny-nf4")[0] == 1
        assert path.exists()
    monkeypatch.setattr(sys, "stdin", Typed("y\n"))
    assert cli(capsys, "rm", "tiny-nf4")[0] == 0
    assert not path.exists()
    assert cli(capsys, "rm", str(cache / "stores" / "half-int8"), "--yes")[0] == 0
    assert cli(capsys, "rm", "half-int8", "--yes")[0] == 1


@pytest.mark.parametrize("beginning", ["tiny", "tiny-nf", "half"])
def test_rm_takes_the_beginning_of_a_name_only_from_a_person(
    cache: Path, beginning: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [path] = (cache / "stores").glob(f"{beginning}*")
    status, _, err = cli(capsys, "rm", beginning, "--yes")
    assert (status, path.exists()) == (1, True)
    assert f"give the whole one: {path.name}." in err
    monkeypatch.setattr(sys, "stdin", Typed("y\n"))
    assert cli(capsys, "rm", beginning)[0] == 0
    assert not path.exists()


def test_rm_of_a_path_needs_no_question(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(cache / "stores")
    assert cli(capsys, "rm", "./tiny-nf4", "--yes")[0] == 0
    assert not (cache / "stores" / "tiny-nf4").exists()
