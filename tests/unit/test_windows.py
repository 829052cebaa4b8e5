"""What Windows has in other ways, with its calls made up. `scripts/test_windows` runs the C library in Wine."""

import ctypes
import errno
import importlib.util
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offload_moe.native import files
from offload_moe.store import durable
from offload_moe.system import folders, locks, open_files, windows

ROOT = Path(__file__).parents[2]

# What Windows lacks is taken away behind the libraries, which have their own ways, and before every module of ours.
IMPORT_ALL = """
import importlib, os, pkgutil, signal, sys
import accelerate, bitsandbytes, gguf, huggingface_hub, numpy, prompt_toolkit, psutil, rich.console, safetensors.torch
import llguidance, markdown_it, starlette.applications, tokenizers, torch, transformers, uvicorn
import prompt_toolkit.history, prompt_toolkit.key_binding, prompt_toolkit.output, prompt_toolkit.shortcuts
import rich.live, rich.markdown, rich.progress, torch.utils.cpp_extension, transformers.modeling_utils
from tests.support.cli import load_cli
import offload_moe.native  # this machine's library stays loaded
for name in [name for name in sys.modules if name.startswith("offload_moe") and name != "offload_moe.native.library"]:
    del sys.modules[name]
for name in ("fcntl", "grp", "pwd", "readline", "resource", "termios", "tty"):
    sys.modules[name] = None
for name in (
    "fork", "geteuid", "getuid", "preadv", "pread", "pwrite", "posix_fadvise", "register_at_fork", "sched_getaffinity",
    "statvfs", "uname", "O_DIRECT", "O_CLOEXEC", "O_NONBLOCK",
):
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGCONT", "SIGKILL", "SIGALRM"):
    delattr(signal, name)
sys.platform = "win32"
load_cli()
import offload_moe, offload_moe_cli
packages = [*offload_moe.__path__], [*offload_moe_cli.__path__]
found = [name for _, name, _ in pkgutil.walk_packages(packages[0], "offload_moe.")]
found += [name for _, name, _ in pkgutil.walk_packages(packages[1], "offload_moe_cli.") if "__main__" not in name]
for name in (name for name in found if not name.endswith("._native")):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name != "ray":  # an extra
            raise
print(len(found))
"""


@pytest.mark.slow  # libraries are imported in a process of their own
def test_every_module_is_imported_without_what_windows_lacks() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 200


class Kernel:
    """The calls that are made of kernel32, and the error they end with."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.opened: list[tuple[Any, ...]] = []
        self.locked: list[tuple[Any, ...]] = []
        self.handlers: list[Any] = []

    def CreateFileW(self, *arguments: Any) -> int | None:  # noqa: N802
        self.opened.append(arguments)
        return windows.INVALID_HANDLE if self.error else 72

    def SetConsoleCtrlHandler(self, handler: Any, is_added: int) -> int:  # noqa: N802
        self.handlers.append(handler)
        return is_added

    def LockFileEx(self, *arguments: Any) -> int:  # noqa: N802
        self.locked.append(arguments)
        return not self.error


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made_up = Kernel()
    runtime = SimpleNamespace(open_osfhandle=lambda handle, flags: handle + 1, get_osfhandle=lambda file: file - 1)
    monkeypatch.setitem(sys.modules, "msvcrt", runtime)
    monkeypatch.setattr(windows, "IS_WINDOWS", True)
    monkeypatch.setattr(windows, "kernel", lambda: made_up)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: made_up.error, raising=False)
    monkeypatch.setattr(ctypes, "FormatError", lambda code: f"error {code} ", raising=False)
    return made_up


def test_files_are_opened_so_that_others_may_replace_them(kernel: Kernel, tmp_path: Path) -> None:
    assert open_files.open_descriptor(tmp_path / "a", open_files.WRITING | os.O_TRUNC) == 73
    assert open_files.open_descriptor(tmp_path / "a") == 73
    assert open_files.open_descriptor(tmp_path / "a", is_direct=True) == 73
    written, read, direct = kernel.opened
    assert written[1:6] == (windows.GENERIC_READ | windows.GENERIC_WRITE, 7, None, windows.CREATE_ALWAYS, 0x80)
    assert read[1:6] == (windows.GENERIC_READ, 7, None, windows.OPEN_EXISTING, 0x80)
    assert direct[5] == 0x60000080


def test_a_file_that_cannot_be_opened_is_named(kernel: Kernel, tmp_path: Path) -> None:
    kernel.error = 2
    with pytest.raises(OSError, match=r"error 2.*missing"):
        open_files.open_descriptor(tmp_path / "missing")


@pytest.mark.parametrize(
    ("flags", "disposition"),
    [
        (os.O_RDWR, windows.OPEN_EXISTING),
        (os.O_RDWR | os.O_CREAT, windows.OPEN_ALWAYS),
        (os.O_RDWR | os.O_CREAT | os.O_EXCL, windows.CREATE_NEW),
        (os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_TRUNC, windows.CREATE_NEW),
        (os.O_RDWR | os.O_TRUNC, windows.TRUNCATE_EXISTING),
    ],
)
def test_flags_mean_what_they_mean_elsewhere(kernel: Kernel, flags: int, disposition: int) -> None:
    windows.open_file("a", flags)
    assert kernel.opened[0][4] == disposition


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("C:\\" + "a" * 200, "C:\\" + "a" * 200),
        ("C:\\" + "ü" * 300, "\\\\?\\C:\\" + "ü" * 300),
        ("\\\\server\\" + "a" * 300, "\\\\?\\UNC\\server\\" + "a" * 300),
        ("\\\\?\\C:\\" + "a" * 300, "\\\\?\\C:\\" + "a" * 300),
    ],
)
def test_long_paths_are_written_in_their_own_form(path: str, expected: str) -> None:
    assert windows.extended(path) == expected


def test_a_console_that_is_closed_ends_a_command_in_order(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGUSR1 stands for SIGBREAK."""
    waited: list[float] = []
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    monkeypatch.setattr(ctypes, "WINFUNCTYPE", lambda *_: lambda function: function, raising=False)
    monkeypatch.setattr(windows, "time", SimpleNamespace(sleep=waited.append))
    spec = importlib.util.spec_from_file_location("ending_on_windows", ROOT / "cli" / "ending.py")
    assert spec is not None
    assert spec.loader is not None
    ending = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ending)
    ended: list[int] = []
    close, control_c = 2, 0
    with pytest.raises(ending.EndedBySignal, match=str(int(signal.SIGUSR1))), ending.ended_by_signals():
        (handler,) = kernel.handlers
        assert handler(control_c) == 0
        thread = threading.Thread(target=lambda: ended.append(handler(close)))
        thread.start()
        for _ in range(1000):  # what the command does
            time.sleep(0.005)
    thread.join()
    assert ended == [1]
    assert waited == [windows.CLOSING_S]
    assert handler(close) == 0, "nothing is left to end"


def test_long_paths_reach_every_call_in_their_own_form(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(windows, "IS_WINDOWS", True)
    monkeypatch.setattr(os.path, "abspath", lambda path: str(path))
    for name in ("replace", "unlink", "makedirs"):
        monkeypatch.setattr(os, name, lambda *paths, name=name, **_: calls.append((name, *map(str, paths))))
    long, short = "C:\\" + "a" * 300, "C:\\b"
    open_files.replace_file(long, Path(short))
    folders.delete_file(Path(long))
    folders.make_folder(Path(long))
    folders.make_folder(Path(short))
    extended = "\\\\?\\" + long
    assert calls == [("replace", extended, short), ("unlink", extended), ("makedirs", extended), ("makedirs", short)]


def test_names_are_changed_by_the_calls_that_take_long_paths() -> None:
    owners = {"folders.py", "open_files.py"}
    calls = re.compile(r"\bos\.(replace|rename|remove|unlink|mkdir|makedirs)\(|\.(mkdir|unlink|rename)\(")
    sources = [path for room in ("offload_moe", "cli") for path in (ROOT / room).rglob("*.py")]
    assert len(sources) > 200
    assert not [path for path in sources if path.name not in owners and calls.search(path.read_text())]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_does_not_sync_folders(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", sync)
    with nullcontext() if number != errno.EIO else pytest.raises(OSError, match="Input/output"):
        durable.write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize(("error", "state"), [(0, "locked"), (33, "held elsewhere"), (50, "unavailable")])
def test_locks_lie_behind_the_bytes_that_others_read(kernel: Kernel, error: int, state: str) -> None:
    kernel.error = error
    failed = OSError(errno.EACCES, "locked")
    failed.winerror = error  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "last_error", lambda _: failed)
        assert locks.try_lock(73) == state
    handle, flags, _, low, high, place = kernel.locked[0]
    assert (handle, flags, low, high) == (72, windows.LOCK_AT_ONCE | windows.LOCK_EXCLUSIVE, 1, 0)
    assert struct.unpack("<QQIIQ", place.raw)[3] << 32 > 1 << 60


def test_what_is_open_elsewhere_is_replaced_a_little_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []
    really_replace = os.replace

    def replace(part: Path, final: Path) -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise PermissionError(errno.EACCES, "Access is denied", str(final))
        really_replace(part, final)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(open_files, "RETRY_S", 0.001)
    (tmp_path / "a.part").write_bytes(b"new")
    with pytest.raises(PermissionError):  # elsewhere it means that the folder is not ours
        durable.publish(tmp_path / "a.part", tmp_path / "a")
    monkeypatch.setattr(windows, "IS_WINDOWS", True)
    durable.publish(tmp_path / "a.part", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new"
    attempts.clear()
    monkeypatch.setattr(open_files, "IN_THE_WAY_S", 0.0)
    with pytest.raises(OSError, match=r"another process has the file open.*/a'"):
        durable.publish(tmp_path / "a.part", tmp_path / "a")


def test_reads_at_an_offset_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    monkeypatch.delattr(os, "preadv")
    descriptor = os.open(tmp_path / "a", os.O_RDONLY)
    data = bytearray(20)
    assert files.read_fully(descriptor, memoryview(data), 90) == 10
    assert data == bytes(range(90, 100)) + bytes(10)
    assert files.read_at(descriptor, memoryview(data), 100) == 0
    assert files.read_at(descriptor, memoryview(bytearray()), 0) == 0
    os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.read_at(descriptor, memoryview(data), 0)
