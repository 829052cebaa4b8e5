"""GGUF files on the hub before they are downloaded: plan, info, and what is refused, out of their headers alone."""

import json
import struct
from pathlib import Path

import gguf
import pytest

from offload_moe.checkpoint import gguf_header
from offload_moe.checkpoint.gguf_header import parse_header
from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.plan.machine import Machine
from offload_moe.plan.plan import make_plan
from tests.support.cli import load_cli
from tests.support.gguf_models import write_model
from tests.support.hub import Hub, hub_in_use

NAME = "org/tiny:Q4_K_M"
MACHINE = Machine(ram_bytes=4 << 30)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_header, "BEGINNING", 1000)
    return tmp_path / "cache"


def repository(folder: Path, *, tensors_per_file: int = 0, kind: str = "Q4_K") -> Path:
    """Returns the local file."""
    path = write_model(folder, "qwen3_moe", kind, None, tensors_per_file, num_hidden_layers=1).path
    for part in sorted(folder.iterdir()):
        part.rename(part.with_name(part.name.replace("model", "tiny-Q4_K_M")))
    return path.with_name(path.name.replace("model", "tiny-Q4_K_M"))


def sent(hub: Hub) -> int:
    return sum(hub.sent.values())


def whole(hub: Hub) -> int:
    return sum(map(len, hub.files.values()))


def test_a_plan_before_and_after_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    path = repository(tmp_path / "repository", tensors_per_file=6)
    local = make_plan(path, MACHINE)
    before = len([*(cache / "stores").iterdir()])
    with hub_in_use(path.parent, tmp_path / "hub", monkeypatch) as hub:
        plan = make_plan(NAME, MACHINE)
        assert sent(hub) < whole(hub) / 4
        assert len([*(cache / "stores").iterdir()]) == before
        assert (plan.checkpoint_bytes, plan.checkpoint_is_exact) == (whole(hub), True)
        for attribute in ("ram", "vram"):
            assert getattr(plan.placement, attribute) == getattr(local.placement, attribute)
        assert (plan.placement.disk.fixed_bytes, local.placement.disk.fixed_bytes) == (whole(hub), 0)
        quantize(NAME, tmp_path / "store")
        downloaded = sent(hub)
        assert make_plan(NAME, MACHINE).placement == local.placement
        assert sent(hub) == downloaded


def test_info_before_and_after_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = repository(tmp_path / "repository")
    with hub_in_use(path.parent, tmp_path / "hub", monkeypatch) as hub:
        assert load_cli().main(["info", NAME]) == 0
        out = capsys.readouterr().out
        assert "GGUF file on the hub, not downloaded" in out
        assert "4 in 1 layers, gguf (Q4_K, Q6_K)" in out
        assert "path" not in out
        assert sent(hub) < whole(hub) / 4
        assert load_cli().main(["info", "--json", NAME]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["path"], document["types"], document["source"]) == (None, ["Q4_K", "Q6_K"], NAME)
        quantize(NAME, tmp_path / "store")
        assert load_cli().main(["info", NAME]) == 0
        assert "path" in capsys.readouterr().out


def test_types_that_have_no_kernel_are_refused_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = repository(tmp_path / "repository", kind="IQ2_XXS")
    with hub_in_use(path.parent, tmp_path / "hub", monkeypatch) as hub:
        with pytest.raises(CheckpointError, match=r"tensor blk\.0\.ffn_gate_exps\.weight is IQ2_XXS"):
            quantize(NAME, tmp_path / "store")
        assert sent(hub) < whole(hub) / 4
        quantize(NAME, tmp_path / "store", codec="int8")


def test_options_that_cannot_be_had_are_refused_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_in_use(repository(tmp_path / "repository").parent, tmp_path / "hub", monkeypatch) as hub:
        with pytest.raises(ConfigError, match="keeps the types of all its matrices"):
            quantize(NAME, tmp_path / "store", dense_codec="int8")
        assert sent(hub) == 0


def header_end(data: bytes, what: str) -> int | None:
    return None if (header := parse_header(data, what)) is None else header.num_bytes


def test_where_a_header_ends(tmp_path: Path) -> None:
    path = repository(tmp_path)
    data = path.read_bytes()
    last = gguf.GGUFReader(path).tensors[-1].field
    end = last.offset + sum(part.nbytes for part in last.parts)
    assert header_end(data, "a") == header_end(data[:end], "a") == end
    assert {header_end(data[:count], "a") for count in range(0, end, 97)} == {None}
    assert header_end(data[: end - 1], "a") is None
    with pytest.raises(CheckpointError, match="tiny is not a GGUF file: it begins with b'PK"):
        header_end(b"PK12" + data[4:], "tiny")
    with pytest.raises(CheckpointError, match="of version 9; versions 2 and 3 are read"):
        header_end(data[:4] + b"\x09\0\0\0" + data[8:], "tiny")
    count, nested = struct.pack("<Q", 1), struct.pack("<IQ", 9, 1) * 5000
    with pytest.raises(CheckpointError, match="arrays of its metadata are nested without end"):
        header_end(data[:8] + struct.pack("<Q", 0) + count + count + b"k" + struct.pack("<I", 9) + nested, "tiny")
    kind = data.index(b"general.architecture") + len("general.architecture")
    with pytest.raises(CheckpointError, match="its metadata has a value of type 77"):
        header_end(data[:kind] + b"\x4d\0\0\0" + data[kind + 4 :], "tiny")


def test_no_more_than_the_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = repository(tmp_path / "repository")
    monkeypatch.setattr(gguf_header, "MOST", 1500)
    monkeypatch.setattr(gguf_header, "parse_header", lambda beginning, what: asked.append(len(beginning)))
    asked: list[int] = []
    with hub_in_use(path.parent, tmp_path / "hub", monkeypatch), pytest.raises(CheckpointError, match="does not end"):
        make_plan(NAME, MACHINE)
    assert asked == [gguf_header.BEGINNING, gguf_header.MOST]


def test_a_header_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = repository(tmp_path / "repository")
    path.write_bytes(path.read_bytes()[:4000])
    with (
        hub_in_use(path.parent, tmp_path / "hub", monkeypatch),
        pytest.raises(CheckpointError, match=r"tiny-Q4_K_M\.gguf of org/tiny is damaged or cut short: its header does"),
    ):
        make_plan(NAME, MACHINE)
