"""Slow, flaky and lying disks beneath a process: the same tokens and bytes, or one line that names what failed."""

import errno
import shutil
import sys
from pathlib import Path

import pytest

from offload_moe.convert.quantize import quantize
from offload_moe.convert.repair import find_damage
from offload_moe.store import Store
from tests.fault.test_users_machines import content
from tests.support.chat import chat_store
from tests.support.checkpoints import write_checkpoint
from tests.support.cli import INSTALLED
from tests.support.unreliable import Done, on_a_disk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and /proc"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]
# Every token reads experts: there are three slots. What is cached would be copied from memory.
ANSWER = """
import sys
from pathlib import Path
from offload_moe.errors import OffloadMoeError
from offload_moe.store.reading import forget_cached
from tests.support.short_of_slots import short_of_slots
store = Path(sys.argv[1])
for file in store.iterdir():
    forget_cached(file)
try:
    with short_of_slots(store, 3) as model:
        print(ascii("".join(piece.text for piece in model.chat().send("Hello", temperature=0, max_new_tokens=64))))
except OffloadMoeError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
# Rare enough for four threads that a read which is tried again is not hit again.
AT_TIMES = [
    pytest.param({"delay": 3000}, "delayed", id="slow"),
    pytest.param({"shorten": 2}, "shortened", id="short reads"),
    pytest.param({"fail": 29}, "failed", id="errors that pass"),
    pytest.param({"corrupt": 41}, "corrupted", id="wrong bytes at times"),
    pytest.param({"delay": 500, "shorten": 3, "fail": 37, "corrupt": 41}, "failed", id="all of it"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("store"), moe_intermediate_size=256)


@pytest.fixture(scope="module")
def answer(store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    done = on_a_disk(tmp_path_factory.mktemp("sound"), ANSWER, str(store), under="experts-")
    assert done.status == 0, done.err
    assert done.counts.calls > 100
    assert done.counts.failed == done.counts.corrupted == 0
    return done.out


@pytest.mark.parametrize(("disk", "what"), AT_TIMES)
def test_an_answer_is_the_same(disk: dict[str, int], what: str, store: Path, answer: str, tmp_path: Path) -> None:
    done = on_a_disk(tmp_path, ANSWER, str(store), under="experts-", **disk)
    assert (done.status, done.out) == (0, answer), done.err
    assert getattr(done.counts, what) > 3


@pytest.mark.parametrize(
    ("under", "disk", "words"),
    [
        pytest.param("experts-", {"fail": 1}, ["Reading expert", "Input/output error"], id="experts that fail"),
        pytest.param("experts-", {"corrupt": 1}, ["expert", "does not match its checksum"], id="experts that lie"),
        pytest.param("dense-", {"fail": 1}, ["Input/output error"], id="dense weights that fail"),
        pytest.param("dense-", {"corrupt": 1}, ["does not match its checksum"], id="dense weights that lie"),
        pytest.param("store.json", {"fail": 1}, ["Input/output error"], id="a manifest that fails"),
        pytest.param("store.json", {"corrupt": 1}, ["damaged"], id="a manifest that lies"),
    ],
)
def test_a_disk_that_stays_wrong_is_named(
    under: str, disk: dict[str, int], words: list[str], store: Path, tmp_path: Path
) -> None:
    done = on_a_disk(tmp_path, INSTALLED, "run", str(store), "Hi.", "--ram", "1GiB", under=under, **disk)
    assert (done.status, done.out) == (1, "")
    assert done.error.startswith("error: ")
    for word in (under, *words):
        assert word in done.error
    assert "--debug" not in done.error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write_checkpoint(folder, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path) -> dict[str, bytes]:
    return content(quantize(checkpoint, checkpoint.parent / "undisturbed", codec="nf4"))


def convert(checkpoint: Path, store: Path, under: Path, **disk: int) -> Done:
    arguments = ("quantize", str(checkpoint), str(store), "--codec", "nf4")
    return on_a_disk(store.parent, INSTALLED, *arguments, under=f"{under}/", **disk)


@pytest.mark.parametrize(
    ("disk", "what"),
    [
        pytest.param({"delay": 500}, "delayed", id="slow"),
        pytest.param({"shorten": 2, "shorten_write": 2}, "shortened", id="short reads and writes"),
    ],
)
def test_a_conversion_writes_the_same_bytes(
    disk: dict[str, int], what: str, checkpoint: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "store", under=tmp_path, **disk)
    assert done.status == 0, done.err
    assert getattr(done.counts, what) > 5
    assert content(tmp_path / "store") == undisturbed


@pytest.mark.parametrize(
    ("disk", "error", "place", "words"),
    [
        pytest.param({"fail": 30}, errno.EIO, "model", "Input/output error", id="the source fails"),
        pytest.param({"fail_write": 6}, errno.EIO, "store", "Input/output error", id="the store fails"),
        pytest.param({"fail_write": 9}, errno.ENOSPC, "store", "is full", id="the disk is full"),
        pytest.param({"fail_write": 9}, errno.EDQUOT, "store", "is full", id="the quota is used up"),
    ],
)
def test_a_conversion_that_fails_is_named_and_resumed(
    disk: dict[str, int],
    error: int,
    place: str,
    words: str,
    checkpoint: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    model, store = shutil.copytree(checkpoint, tmp_path / "model"), tmp_path / "store"
    done = convert(model, store, under=tmp_path / place, errno=error, **disk)
    assert done.counts.failed > 0
    assert done.status == 1
    assert done.error.startswith("error: ")
    assert words in done.error
    assert str(tmp_path / place) in done.error
    assert "--debug" not in done.error
    done = convert(model, store, under="none")
    assert (done.status, content(store)) == (0, undisturbed)


def test_what_a_disk_wrote_wrong_is_found(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = convert(checkpoint, store, under=store, corrupt_write=4)
    assert done.counts.corrupted > 3
    if done.status:  # it was noticed at once
        assert "damaged" in done.error
        return
    assert list(find_damage(Store.open(store)))
