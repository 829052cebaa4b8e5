"""A cache that two versions share, and a disk that is full at each file that is written: what was there stays."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offload_moe.chat.transcript import write_transcript
from offload_moe.convert.quantize import quantize
from offload_moe.errors import OffloadMoeError, StoreError
from offload_moe.profile.trace import Trace, save_trace
from offload_moe.store.journal import JOURNAL_NAME
from offload_moe.system.whole_files import write_whole
from tests.fault.test_users_machines import content, largest_file
from tests.support.checkpoints import write_checkpoint
from tests.support.cli import load_cli

main = load_cli()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(folder))
    monkeypatch.setenv("OFFLOAD_MOE_CONFIG", str(folder / "config.toml"))
    (folder / "stores").mkdir(parents=True)
    return folder


def of_a_later_version(store: Path, **changes: Any) -> Path:
    document = json.loads((store / "store.json").read_text()) | {"version": 99} | changes
    del document["checksum"]
    document["checksum"] = zlib.crc32(json.dumps(document, sort_keys=True).encode())
    (store / "store.json").write_text(json.dumps(document))
    return store


def test_a_store_of_a_later_version_is_named_and_left_alone(
    checkpoint: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = of_a_later_version(quantize(checkpoint, cache / "stores" / "later", codec="nf4"), more={"of": "that"})
    before = content(cache)
    for command in (["run", "-f", __file__], ["verify"], ["verify", "--repair"], ["verify", "--upgrade"]):
        assert main.main([command[0], str(later), *command[1:]]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        assert f"{later} is a store of format version 99, this program reads versions" in line
    with pytest.raises(StoreError, match=r"finished|already"):
        quantize(checkpoint, later, codec="nf4")
    assert main.main(["info", str(later)]) == 0
    assert "format version 99" in " ".join(capsys.readouterr().out.split())
    assert main.main(["list"]) == 0
    assert "store of a later version" in capsys.readouterr().out
    assert content(cache) == before


def test_a_conversion_of_a_later_version_is_left_alone(checkpoint: Path, cache: Path) -> None:
    store = quantize(checkpoint, cache / "stores" / "later", codec="nf4")
    (store / "store.json").unlink()
    (store / JOURNAL_NAME).write_text(json.dumps({"codec": "nf4", "of a later version": 7}) + "\n1234abcd\n")
    before = content(cache)
    with pytest.raises(StoreError, match="later"):
        quantize(checkpoint, store, codec="nf4")
    assert main.main(["list"]) == 0
    assert content(cache) == before


def test_settings_of_a_later_version_are_named_and_kept(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "config.toml").write_text('ram = "2GiB"\nlater = "setting"\n')
    before = content(cache)
    for command in (["config"], ["config", "ram", "1GiB"]):
        assert main.main(command) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert str(cache / "config.toml") in line
        assert "'later'" in line
    assert content(cache) == before


def test_strangers_in_the_cache_stay(checkpoint: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = quantize(checkpoint, cache / "stores" / "ours", codec="nf4")
    for name in ("stores/later/index", "later/index", "demo/later/index", "cubins/later", "stores/ours/later.json"):
        (cache / name).parent.mkdir(exist_ok=True, parents=True)
        (cache / name).write_text("of a later version")
    (store / "popularity.json").write_text('{"format": 99}')
    before = content(cache)
    for command in (["list"], ["info", "ours"], ["verify", "ours"]):
        assert main.main(command) == 0, capsys.readouterr().err
    assert content(cache) == before
    assert main.main(["rm", "--yes", "ours"]) in (0, 1)
    after = content(cache)
    assert {name: after.get(name) for name in before if "later" in name} == {
        name: data for name, data in before.items() if "later" in name
    }


LONG = "x" * 100_000


def save_chat(path: Path) -> None:
    write_transcript(path, system=None, messages=[{"role": "user", "content": LONG}])


def write_text(path: Path) -> None:
    write_whole(path, LONG.encode())


def write_trace(path: Path) -> None:
    experts = np.random.default_rng(0).permuted(np.tile(np.arange(200), (1000, 1)), axis=1).reshape(500, 2, 200)
    save_trace(Trace(experts=experts[..., :100], num_experts=200, sequence_lengths=np.array([500])), path)


@pytest.mark.parametrize("write", [save_chat, write_text, write_trace])
def test_a_full_disk_leaves_the_old_file(write: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with largest_file(4096), pytest.raises((OffloadMoeError, OSError), match=str(path)):
        write(path)
    assert content(tmp_path) == {"file": b"old"}
    write(path)
    assert len(path.read_bytes()) >= len(LONG)


@pytest.mark.parametrize(
    "command",
    [["config", "port", "8001"], ["doctor", "--report", "{file}"], ["--install-completion", "bash"]],
    ids=["settings", "report", "completion"],
)
def test_a_full_disk_is_named_with_the_file(
    command: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = cache / "offload-moe"
    monkeypatch.setenv("OFFLOAD_MOE_CONFIG", str(file))
    monkeypatch.setenv("BASH_COMPLETION_USER_DIR", str(cache))
    monkeypatch.setattr("offload_moe.doctor.examination.measurements", lambda _: [])
    if command[0] == "--install-completion":
        (file := cache / "completions" / "offload-moe").parent.mkdir()
    file.write_text('ram = "2GiB"\n' + "# a comment\n" * 20)
    before = content(cache)
    with largest_file(100):
        assert main.main([word.format(file=file) for word in command]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert str(file) in line
    assert "--debug" not in line
    assert content(cache) == before
