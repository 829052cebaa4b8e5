"""`quantize` killed with SIGKILL at random moments, then resumed: byte for byte the undisturbed store."""

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from offload_moe.convert.calibration_text import BUILT_IN
from offload_moe.convert.quantize import quantize
from offload_moe.store import is_store
from tests.support.chat import byte_tokenizer
from tests.support.checkpoints import write_checkpoint

# Forks children that convert into store/0, store/1, ... and kills each after its delay; prints how long an undisturbed
# conversion takes, then one status per child. Forking saves the seconds of imports that would dwarf the conversion.
KILLER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from offload_moe.convert.quantize import quantize

source, folder, count, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])

def start(name):
    child = os.fork()
    if child == 0:
        quantize(source, f"{folder}/{name}", **options)
        os._exit(0)
    return child

quantize(source, f"{folder}/warm", **options)  # imports what is imported late
begun = time.perf_counter()
os.waitpid(start("undisturbed"), 0)
whole = time.perf_counter() - begun
print(whole)
chosen = random.Random(1)
for index in range(count):
    child = start(str(index))
    time.sleep(chosen.random() * whole)
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1])
    os.waitpid(start(str(index)), 0)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_and_resume(tmp_path: Path, count: int, **options: str) -> int:
    """How many of the kills came before the conversion was over."""
    write_checkpoint(tmp_path / "model", num_hidden_layers=4, num_experts=16, vocab_size=300)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "model"), str(tmp_path), str(count), json.dumps(options)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    undisturbed = content(tmp_path / "undisturbed")
    assert {"store.json", "experts-00001.safetensors", "dense-00001.safetensors"} <= set(undisturbed)
    for index in range(count):
        assert content(tmp_path / str(index)) == undisturbed, index
    statuses = [int(line) for line in result.stdout.split()[1:]]
    return sum(status == 9 for status in statuses)


@pytest.mark.slow
def test_kill_9_at_fifty_random_points(tmp_path: Path) -> None:
    assert kill_and_resume(tmp_path, 50, codec="bf16") >= 25


@pytest.mark.slow
def test_kill_9_of_a_calibration_at_thirty_random_points(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(BUILT_IN.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    assert kill_and_resume(tmp_path, 30, codec="nf4", dense_codec="nf4", calibrate=str(text)) >= 15
    assert not list(tmp_path.glob("*.calibration"))


class Stopped(BaseException):
    """Ends a conversion from within its progress report."""


def test_stopped_between_experts_and_resumed(tmp_path: Path) -> None:
    """Without a second process: stopped after some records, again and again."""
    write_checkpoint(tmp_path / "model")
    undisturbed = content(quantize(tmp_path / "model", tmp_path / "undisturbed", codec="nf4", dense_codec="int8"))
    stop = StopAfter()
    store = tmp_path / "store"
    while not is_store(store):
        with contextlib.suppress(Stopped):
            quantize(tmp_path / "model", store, codec="nf4", dense_codec="int8", progress=stop)
    assert stop.num_stops > 2
    assert content(store) == undisturbed


class StopAfter:
    """Stops every run after a few reports; a resumed run must go on from where it was."""

    def __init__(self) -> None:
        self.num_stops = 0
        self._done_bytes = 0.0
        self._random = random.Random(0)

    def __call__(self, phase: str, done: float = -1.0, total: float | None = None) -> None:
        assert total is not None
        assert done >= self._done_bytes
        self._done_bytes = done
        if self._random.random() < 0.15 and done < total:
            self.num_stops += 1
            raise Stopped
