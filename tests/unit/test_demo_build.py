"""Building once, whatever happens."""

import errno
import os
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import save

from offload_moe.demo import build, checkpoint
from offload_moe.demo.source import WHEEL_SHA256
from offload_moe.demo.split import digest, parse_split, split_bytes
from offload_moe.errors import BudgetError
from offload_moe.system.locks import lock_file
from offload_moe.system.progress import Progress
from tests.fault.test_users_machines import largest_file
from tests.support.demo import tiny_dense, tiny_split


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The real build on a tiny dense model; the list grows with every fetch."""
    calls: list[Path] = []

    def fetch(downloads: Path, progress: Progress) -> object:
        calls.append(downloads)
        progress("fetching", 3, 6)
        return tiny_dense()

    monkeypatch.setattr(build, "fetch_dense", fetch)
    monkeypatch.setattr(build, "split_bytes", lambda: save(tiny_split().tensors()))
    return calls


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_builds_once_and_the_same_bytes_elsewhere(tmp_path: Path, fetches: list[Path]) -> None:
    first = checkpoint(cache_dir=tmp_path / "a")
    assert checkpoint(cache_dir=tmp_path / "a") == first
    assert fetches == [tmp_path / "a" / "downloads"]
    second = checkpoint(cache_dir=tmp_path / "b")
    assert contents(first) == contents(second)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= contents(first).keys()


def test_progress_starts_at_once_and_ends_at_one(tmp_path: Path, fetches: list[Path]) -> None:
    steps: list[tuple[object, ...]] = []
    checkpoint(cache_dir=tmp_path, progress=lambda *step: steps.append(step))
    assert steps[0] == ("fetching", 3, 6)
    assert steps[1:] == [("splitting layers into experts",), ("demo model ready", 1.0)]


def test_a_build_that_fails_leaves_nothing_that_loads(
    tmp_path: Path, fetches: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = build.write_checkpoint

    def fail(folder: Path, *rest: object) -> None:
        written(folder, *rest)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "write_checkpoint", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint(cache_dir=tmp_path)
    assert not [path for path in (tmp_path / "demo").glob("[!.]*") if path.is_dir()]
    monkeypatch.setattr(build, "write_checkpoint", written)
    assert (checkpoint(cache_dir=tmp_path) / "config.json").exists()
    assert not [path for path in (tmp_path / "demo").iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_weights_that_a_full_disk_refuses_are_named_with_sizes(
    code: int, tmp_path: Path, fetches: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(
        BudgetError, match=rf"{tmp_path}.* is full: \d+ KiB are needed, [\d.]+ .iB were free\. Free some"
    ):
        checkpoint(cache_dir=tmp_path)
    assert not list((tmp_path / "demo").glob("*.partial"))


def test_the_words_of_the_library_for_an_error_of_the_system(tmp_path: Path, fetches: list[Path]) -> None:
    with largest_file(4096), pytest.raises(OSError, match=r"\[Errno 27\] File too large: '.*model.safetensors'"):
        checkpoint(cache_dir=tmp_path)
    assert not [path for path in (tmp_path / "demo").iterdir() if path.is_dir()]


def test_names_are_on_the_disk_before_the_folder_counts_as_built(
    tmp_path: Path, fetches: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    really_sync, really_replace = build.sync_folder, build.replace_file

    def sync(folder: Path) -> None:
        events.append(f"sync {folder.name} of {len(list(folder.glob('*')))}")
        really_sync(folder)

    def replace(part: Path, final: Path) -> None:
        events.append("rename")
        really_replace(part, final)

    monkeypatch.setattr(build, "sync_folder", sync)
    monkeypatch.setattr(build, "replace_file", replace)
    built = checkpoint(cache_dir=tmp_path)
    num_files = len(list(built.iterdir()))
    assert events == [f"sync .{built.name}.partial of {num_files}", "rename", "sync demo of 2"]


def test_a_second_process_waits_and_uses_what_the_first_built(tmp_path: Path, fetches: list[Path]) -> None:
    built = checkpoint(cache_dir=tmp_path)
    hidden = built.rename(built.with_name("elsewhere"))
    waiting = threading.Event()
    found: list[Path] = []

    def progress(phase: str, done: float = -1.0, total: float | None = None) -> None:
        if phase.startswith("waiting for another process"):
            waiting.set()

    thread = threading.Thread(target=lambda: found.append(checkpoint(cache_dir=tmp_path, progress=progress)))
    with lock_file(built.with_name(f"{built.name}.lock")):
        thread.start()
        assert waiting.wait(10)
        hidden.rename(built)
    thread.join(10)
    assert found == [built]
    assert len(fetches) == 1


def test_the_folder_is_named_after_the_shipped_split() -> None:
    assert digest(split_bytes(), WHEEL_SHA256) == digest(split_bytes(), WHEEL_SHA256)
    assert digest(split_bytes(), WHEEL_SHA256) != digest(save(tiny_split().tensors()), WHEEL_SHA256)


def test_the_shipped_split_is_what_the_readme_says() -> None:
    split = parse_split(split_bytes())
    assert (split.num_layers, split.num_experts, split.top_k) == (29, 32, 15)
    for layer in range(split.num_layers):
        shared, routed = split.members(layer)
        assert shared.shape == (512,)
        assert routed.shape == (32, 32)
        assert len(set(shared.tolist()) | set(routed.flatten().tolist())) == 1536


def test_a_split_survives_its_file() -> None:
    split = tiny_split()
    read = parse_split(save(split.tensors()))
    assert read.top_k == split.top_k
    for name, tensor in split.tensors().items():
        assert read.tensors()[name].equal(tensor), name
