"""Machines as users have them: low limits, no home, another locale, folders that cannot be written, a full disk.

Each cell runs or says in one line what is wrong; what was there before is whole afterwards.
"""

import errno
import os
import pwd
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload_moe.convert.quantize import quantize
from offload_moe.errors import ConfigError, TransferError
from offload_moe.system.paths import check_writable
from tests.support.chat import byte_tokenizer, chat_model
from tests.support.checkpoints import write_checkpoint
from tests.support.cli import ROOT, environment, load_cli
from tests.support.cuda import shim

main = load_cli()
# Root may write everywhere, unless it gives that up.
AS_A_USER = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"] if os.getuid() == 0 else []
RUN = "import sys; from tests.support.cli import load_cli; sys.exit(load_cli().main(sys.argv[1:]))"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """A limit beyond which writes fail, as on a full disk; Python ignores the signal."""
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_conversion_that_meets_the_largest_file_resumes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", num_hidden_layers=2)
    whole = content(quantize(tmp_path / "model", tmp_path / "undisturbed", codec="nf4"))
    largest = max(map(len, whole.values()))
    store, failures = tmp_path / "store", 0
    for num_bytes in (100, largest // 4, largest // 2, largest - 1):
        with (
            largest_file(num_bytes),
            pytest.raises(TransferError, match=r"store failed: .*ulimit -f.*same command") as it,
        ):
            quantize(tmp_path / "model", store, codec="nf4")
        failures += str(store) in str(it.value)
    assert failures == 4
    assert content(quantize(tmp_path / "model", store, codec="nf4")) == whole


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is a number."""

    def unknown(_: object) -> None:
        raise KeyError

    for name in ("HOME", "OFFLOAD_MOE_CACHE", "OFFLOAD_MOE_CONFIG", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("command", [["list"], ["info", "mixtral"], ["chat", "mixtral"], ["plan", "mixtral"]])
def test_without_a_home_folder_an_error_says_so(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(command) == 1
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("error: There is no home folder. Set HOME, or OFFLOAD_MOE_")
    )


@pytest.mark.usefixtures("no_home")
def test_without_a_home_folder_defaults_are_shown_but_not_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["config"]) == 0
    assert "none, as there is no home folder" in capsys.readouterr().err
    assert main.main(["config", "ram", "1GiB"]) == 1
    assert "Set OFFLOAD_MOE_CONFIG to a file" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["info"], ["chat"], ["quantize"], ["run", "demo", "-f"], ["plan"]])
def test_a_user_who_does_not_exist_is_named(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["x"] if command == ["quantize"] else []
    assert main.main([*command, "~nobody-of-this-name/x", *rest]) == 1
    assert "~nobody-of-this-name/x names the folder of a user who does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "There is no memory left for this process. Close programs, or raise the limit"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "There is no memory left for this process."),
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object"),
            "There is no memory left to load a library: libtorch_cpu.so: failed to map segment",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/demo"), "/cache/demo. OFFLOAD_MOE_CACHE names"),
        (OSError(errno.EROFS, "Read-only file system", "/cache/a/b"), "/cache/a/b. OFFLOAD_MOE_CACHE names"),
        (PermissionError(errno.EACCES, "Permission denied", "/other"), "Permission denied: /other"),
        (ImportError("No module named 'x'"), "ImportError: No module named 'x'. Run again with --debug"),
    ],
)
def test_errors_of_the_system_say_what_to_do(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload_moe_cli.failures import one_line

    monkeypatch.setenv("OFFLOAD_MOE_CACHE", "/cache")
    line = one_line(error)
    assert expected in line
    assert ("OFFLOAD_MOE_CACHE" in line) == ("OFFLOAD_MOE_CACHE" in expected)


def test_where_a_result_goes_is_checked_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_writable(tmp_path / "new.npz")
    (tmp_path / "old.npz").touch()
    check_writable(tmp_path / "old.npz")
    with pytest.raises(ConfigError, match="its folder does not exist"):
        check_writable(tmp_path / "missing" / "x.npz")
    with pytest.raises(ConfigError, match="it is a folder"):
        check_writable(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) not in (tmp_path, tmp_path / "old.npz"))
    for name in ("new.npz", "old.npz"):
        with pytest.raises(ConfigError, match="the system refuses it"):
            check_writable(tmp_path / name)
        for flags in (["profile", "demo", "--trace"], ["profile", "demo", "--html"], ["doctor", "--report"]):
            assert main.main([*flags, str(tmp_path / name)]) == 1
            assert f"error: {tmp_path / name} cannot be written" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that can be chatted with; the store of it lies in `cache` beside it."""
    folder = tmp_path_factory.mktemp("machine") / "model"
    tiny = chat_model("mixtral", num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=16384)
    tiny.generation_config.max_new_tokens = 8
    tiny.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    done = run(model=folder, cache=folder.parent / "cache")
    assert done.returncode == 0, done.stderr
    return folder


def run(
    *, model: Path, cache: Path, around: str = 'exec "$@"', prefix: list[str] | None = None, **changes: str
) -> "subprocess.CompletedProcess[str]":
    """`offload-moe run` inside of what a shell sets up. around: with the command as its arguments."""
    command = [sys.executable, "-c", RUN, "run", str(model), "Hi.", "--ram", "1GiB"]
    return subprocess.run(
        [*(prefix or []), "bash", "-c", around, "bash", *command],
        env=environment(cache, **changes),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
    )


def can(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


IN_A_NAMESPACE = ["unshare", "--mount"]
needs_mounts = pytest.mark.skipif(not can(*IN_A_NAMESPACE, "true"), reason="needs the right to mount")
needs_setpriv = pytest.mark.skipif(bool(AS_A_USER) and not can(*AS_A_USER, "true"), reason="root, without setpriv")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("around", "changes"),
    [
        pytest.param('ulimit -n 24; exec "$@"', {}, id="few open files"),
        pytest.param('ulimit -v 1500000; exec "$@"', {}, id="little address space"),
        pytest.param('ulimit -s 512; exec "$@"', {}, id="small stacks"),
        pytest.param('unset HOME; exec "$@"', {}, id="HOME unset"),
        pytest.param('exec "$@" <&- 2>&-', {}, id="standard streams closed"),
    ],
)
def test_it_answers(around: str, changes: dict[str, str], model: Path, tmp_path: Path) -> None:
    expected = run(model=model, cache=model.parent / "cache").stdout
    assert expected.strip()
    done = run(model=model, cache=tmp_path / "cache", around=around, **changes)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


@pytest.mark.slow
@needs_setpriv
@pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler for the fake card")
def test_without_locked_memory_a_card_has_the_same_bits_and_one_notice(tmp_path: Path) -> None:
    """On the CPU nothing is locked: so on a card of the fake driver, whose pages the system locks."""
    from tests.support.card_model import store_of

    store = store_of("qwen3_moe", tmp_path)
    found = {}
    for limit in ("true", "ulimit -l 0"):
        without_right = ["setpriv", "--bounding-set", "-ipc_lock"] if os.getuid() == 0 else []
        shell = f'{limit}; exec "$@"'
        command = ["bash", "-c", shell, "bash", *without_right, sys.executable, "-m", "tests.support.system_locks"]
        done = subprocess.run(
            [*command, str(store)],
            cwd=ROOT,
            env=environment(tmp_path / "cache", PYTHONPATH=str(ROOT / "tests")),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        digest, num_locked = done.stdout.split()
        found[limit] = digest, int(num_locked) > 0, done.stderr.count("of RAM was refused (error ")
    assert found["ulimit -l 0"] == (found["true"][0], False, 1)
    assert found["true"][1], "the limit of this machine is too low to show anything"


def in_a_scope(limit: str) -> list[str]:
    return ["systemd-run", "--scope", "--quiet", "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]


@pytest.mark.slow
@pytest.mark.skipif(not can(*in_a_scope("1G"), "true"), reason="systemd-run gives no scope: no cgroup v2 to limit")
def test_in_a_cgroup_with_little_memory_it_answers_within_it(model: Path, tmp_path: Path) -> None:
    expected = run(model=model, cache=model.parent / "cache").stdout
    done = run(model=model, cache=tmp_path / "cache", prefix=in_a_scope("1500M"))
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


@pytest.mark.slow
def test_in_the_c_locale_it_answers_in_ascii(model: Path) -> None:
    cache = model.parent / "cache"
    settings = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = run(model=model, cache=cache, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert "Set PYTHONIOENCODING=utf-8" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [700_000, 550_000, 400_000, 200_000])
def test_too_little_address_space_is_one_line(kilobytes: int, model: Path) -> None:
    done = run(model=model, cache=model.parent / "cache", around=f'ulimit -v {kilobytes}; exec "$@"')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: There is no memory left")


@pytest.mark.slow
@needs_setpriv
def test_a_store_is_read_from_a_folder_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(model.parent / "cache", tmp_path / "cache")
    before = content(cache)
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    done = run(model=model, cache=cache, prefix=AS_A_USER)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(model=model, cache=model.parent / "cache").stdout
    assert content(cache) == before


@pytest.mark.slow
@needs_setpriv
def test_a_cache_that_cannot_be_written_is_one_line(model: Path, tmp_path: Path) -> None:
    (cache := tmp_path / "cache").mkdir(mode=0o555)
    done = run(model=model, cache=cache, prefix=AS_A_USER)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"Writing to {cache}" in last
    assert last.endswith(
        "failed: Permission denied. Choose a folder that you can write; OFFLOAD_MOE_CACHE names another one for models."
    )


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize(
    "mount",
    [
        pytest.param('mount -t tmpfs -o noexec none "$TMPDIR"', id="noexec tmp"),
        pytest.param("mount -t tmpfs -o ro,size=0,mode=000 none /dev/shm", id="no /dev/shm"),
    ],
)
def test_mounts_of_careful_systems(mount: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    around = f'{mount} && exec "$@"'
    done = run(
        model=model, cache=tmp_path / "cache", around=around, prefix=IN_A_NAMESPACE, TMPDIR=str(tmp_path / "tmp")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("kilobytes", [4, 60, 120])
def test_a_full_disk_is_one_line_and_the_next_run_has_room(kilobytes: int, model: Path, tmp_path: Path) -> None:
    (cache := tmp_path / "cache").mkdir()
    around = (
        f'mount -t tmpfs -o size={kilobytes}k none {cache}; "$@"; [ $? = 1 ] || exit 99; '
        f'mount -o remount,size=64m {cache}; exec "$@"'
    )
    done = run(model=model, cache=cache, around=around, prefix=IN_A_NAMESPACE)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "free" in line
    assert done.stdout == run(model=model, cache=model.parent / "cache").stdout
