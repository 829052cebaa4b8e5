"""An unfinished conversion: the command that resumes it, its size with all that lies beside it, and its deletion."""

import errno
import fcntl
import json
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from offload_moe.convert import calibration_text
from offload_moe.convert.calibration_text import BUILT_IN
from offload_moe.convert.quantize import quantize
from offload_moe.errors import StoreError, TransferError
from offload_moe.store import is_store
from offload_moe.store.beside import remove_inputs
from offload_moe.store.installed import check_finished, find, remove
from offload_moe.store.writer import StoreWriter
from offload_moe.system.names import HUB_HOSTS
from tests.integration.test_imatrix import importances, write_imatrix
from tests.support.chat import byte_tokenizer, chat_model
from tests.support.cli import load_cli
from tests.support.gguf_models import write_model
from tests.support.hub import COMMIT, Hub, hub_in_use

SIZES = {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}


class Stopped(BaseException):
    """Ends a conversion from within its progress report."""


def after(phase: str) -> Callable[..., None]:
    def stop(current: str, done: float = -1.0, total: float | None = None) -> None:
        if current == phase and done > 0:
            raise Stopped

    return stop


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a text, importances, an adapter and a GGUF file."""
    root = tmp_path_factory.mktemp("unfinished")
    model = chat_model("qwen3_moe", **SIZES).to(torch.bfloat16)
    model.save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    (root / "some text.txt").write_text(BUILT_IN.read_text(encoding="utf-8")[:1200], encoding="utf-8")
    write_imatrix(root / "imatrix.gguf", importances())
    (root / "lora").mkdir()
    (root / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    name = "model.layers.0.self_attn.q_proj"
    rows, columns = model.get_submodule(name).weight.shape
    halves = {"A": torch.ones(2, columns), "B": torch.ones(rows, 2)}
    tensors = {f"base_model.model.{name}.lora_{half}.weight": value for half, value in halves.items()}
    save_file(tensors, root / "lora" / "adapter_model.safetensors")
    (root / "gguf").mkdir()
    write_model(root / "gguf", "mixtral", "Q8_0", num_hidden_layers=1)
    return root


@pytest.fixture(autouse=True)
def inside(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration_text, "BUILT_IN", made / "some text.txt")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_in_use(Path("model"), tmp_path / "hub", monkeypatch) as hub:
        yield hub


def advised(store: Path) -> str:
    """What follows `Resume it with: `."""
    with pytest.raises(StoreError, match="is an unfinished conversion") as caught:
        check_finished(store)
    return str(caught.value).partition("Resume it with: offload-moe ")[2]


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        (
            "model",
            {"scales": "absmax", "dense_codec": "int8", "revision": "v1"},
            ["model: the folder of the checkpoint"],
        ),
        (
            "model",
            {"calibrate": "some text.txt"},
            ["model: the folder of the checkpoint", "some text.txt: the same file"],
        ),
        ("model", {"calibrate": "auto"}, ["model: the folder of the checkpoint"]),
        (
            "model",
            {"imatrix": "imatrix.gguf", "adapter": "lora"},
            ["model: the folder of the checkpoint", "imatrix.gguf: the same file", "lora: the folder of the adapter"],
        ),
        ("gguf/model.gguf", {}, []),
        (str(Path("gguf", "..", "gguf", "model.gguf")), {"codec": "nf4"}, []),
    ],
)
def test_the_command_resumes_it(source: str, options: dict[str, Any], named: list[str], tmp_path: Path) -> None:
    store = tmp_path / "a store"
    with pytest.raises(Stopped):
        quantize(source, store, **options, progress=after("Quantizing"))
    command, opened, notes = advised(store).partition(" (")
    assert notes == (f"{'; '.join(named)})" if named else "")
    assert bool(opened) == bool(named)
    assert load_cli().main(shlex.split(command)) == 0
    assert content(store) == content(quantize(source, tmp_path / "undisturbed", **options))


@pytest.mark.parametrize(("source", "deletes"), [(f"https://{HUB_HOSTS[0]}/org/tiny", True), ("org/tiny", False)])
def test_the_command_resumes_a_download(hub: Hub, tmp_path: Path, source: str, deletes: bool) -> None:
    store = tmp_path / "store"
    with pytest.raises(Stopped):
        quantize(source, store, delete_source_shards=deletes, progress=after("Quantizing"))
    command = advised(store)
    assert command.endswith(f" --revision {COMMIT}{' --delete-source-shards' * deletes}")
    assert load_cli().main(shlex.split(command)) == 0
    assert is_store(store)
    assert not (tmp_path / "store.download").exists()


def begin(source: str, store: Path, **options: Any) -> set[Path]:
    """Stop a conversion; returns the files beside its folder."""
    with pytest.raises(Stopped):
        quantize(source, store, **options, progress=after("Quantizing"))
    return {path for path in store.parent.glob(f"{store.name}.*/**/*") if path.is_file()}


@pytest.mark.parametrize(
    ("source", "options"), [("model", {"calibrate": "some text.txt"}), ("org/tiny", {"delete_source_shards": True})]
)
def test_what_lies_beside_is_counted_and_deleted(
    hub: Hub, source: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "cache" / "stores" / "half-nf4"
    files = begin(source, store, **options)
    assert len(files) > 2
    total = sum(path.stat().st_size for path in (*files, *store.iterdir()))
    for name in ("half-nf4", "half", store):
        assert find(name).num_bytes == total
    assert load_cli().main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["installed"]
    assert [(entry["name"], entry["bytes"]) for entry in listed] == [("half-nf4", total)]
    assert load_cli().main(["rm", "half-nf4", "--yes"]) == 0
    assert list(store.parent.iterdir()) == []


def test_a_deletion_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half").mkdir()
    assert begin("model", tmp_path / "half", calibrate="some text.txt")
    monkeypatch.chdir(tmp_path / "half")
    remove(find("."))
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_conversion_into_the_current_folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    quantize(made / "model", ".", calibrate=made / "some text.txt")
    assert is_store(Path())
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_download_in_use_stays(hub: Hub, tmp_path: Path) -> None:
    store = tmp_path / "half"
    files = begin("org/tiny", store, delete_source_shards=True)
    note = os.open(tmp_path / "half.download" / "offload-moe-download.json", os.O_RDWR)
    fcntl.flock(note, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match="in use by another process"):
        remove(find(store))
    assert all(path.exists() for path in files)
    os.close(note)
    remove(find(store))
    assert not (tmp_path / "half.download").exists()


@pytest.mark.parametrize(
    ("source", "options", "suffix"),
    [
        ("model", {"calibrate": "some text.txt"}, "calibration"),
        ("org/tiny", {"delete_source_shards": True}, "download"),
    ],
)
def test_files_of_others_stay(hub: Hub, source: str, options: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    store = tmp_path / "half"
    begin(source, store, **options)
    letter = tmp_path / f"half.{suffix}" / "letter.txt"
    letter.write_text("mine")
    remove(find(store))
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.parent == tmp_path] == [letter]
    assert not store.exists()


@pytest.mark.parametrize("suffix", ["calibration", "download"])
def test_a_folder_of_someone_else_is_neither_counted_nor_deleted(suffix: str, tmp_path: Path) -> None:
    store = tmp_path / "half"
    begin("model", store)
    letter = tmp_path / f"half.{suffix}" / "state.safetensors"
    letter.parent.mkdir()
    letter.write_text("mine")
    assert find(store).num_bytes == sum(path.stat().st_size for path in store.iterdir())
    remove(find(store))
    assert list(tmp_path.rglob("*state*")) == [letter]


class Killed(BaseException):
    """In place of a deletion."""


@pytest.mark.parametrize("is_stopped_in_the_forward", [True, False])
def test_a_deletion_of_inputs_that_is_killed_anywhere_can_be_done_again(
    is_stopped_in_the_forward: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = "Calibrating" if is_stopped_in_the_forward else "Quantizing"
    with pytest.raises(Stopped):
        quantize("model", tmp_path / "half", calibrate="some text.txt", progress=after(phase))
    folder, calls = tmp_path / "half.calibration", 0

    def once(delete: Callable[[Any], None]) -> Callable[[Any], None]:
        def delete_or_die(path: Any) -> None:
            nonlocal calls
            calls += 1
            if calls % 2 == 0:
                raise Killed
            delete(path)

        return delete_or_die

    monkeypatch.setattr(os, "unlink", once(os.unlink))
    monkeypatch.setattr(Path, "rmdir", once(Path.rmdir))
    num_killed = 0
    while folder.exists():
        try:
            remove_inputs(folder)
        except Killed:
            num_killed += 1
    assert num_killed > 2


@pytest.mark.parametrize("num_deleted", [1, 3])
def test_a_conversion_goes_on_after_a_deletion_that_was_killed(
    num_deleted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, unlink, left = tmp_path / "half", os.unlink, [0] * num_deleted
    begin("model", store, calibrate="some text.txt")

    def delete_or_die(path: str) -> None:
        if not left:
            raise Killed
        left.pop()
        unlink(path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "unlink", delete_or_die)
        remove(find(store))
    quantize("model", store, calibrate="some text.txt")
    assert content(store) == content(quantize("model", tmp_path / "undisturbed", calibrate="some text.txt"))


def test_a_link_to_a_folder_of_inputs_is_refused(tmp_path: Path) -> None:
    """Nothing in it would be deleted, and what it has of another text would be taken for that of this one."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("calibration.json", "complete"):
        (tmp_path / "elsewhere" / name).write_text("{}")
    (tmp_path / "half.calibration").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"half\.calibration is not empty and not ours"):
        quantize("model", tmp_path / "half", calibrate="some text.txt")


@pytest.mark.parametrize("left", ["calibration", "calibration/calibration.json.part", "download"])
def test_what_a_kill_at_the_beginning_or_the_end_leaves_is_deleted(left: str, tmp_path: Path) -> None:
    folder, _, file = left.partition("/")
    (tmp_path / f"half.{folder}").mkdir()
    if file:
        (tmp_path / f"half.{folder}" / file).touch()
    quantize("model", tmp_path / "half")
    remove(find(tmp_path / "half"))
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_deletion_at_the_end_is_one_of_ours(tmp_path: Path) -> None:
    def refuse() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with StoreWriter(tmp_path / "store", [], {}) as writer, pytest.raises(TransferError, match="Permission denied"):
        writer.finish("{}", {}, refuse)
    assert (tmp_path / "store" / "conversion.journal").exists()
