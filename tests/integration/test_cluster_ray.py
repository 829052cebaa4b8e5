"""Two Ray nodes on one machine, one of them killed under load: nothing hangs, and every answer is the engine's own."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from offload_moe import load
from tests.integration.test_serve_command import READY
from tests.support.chat import chat_store
from tests.support.cli import INSTALLED, ROOT, environment, load_cli
from tests.support.serving import chat, events, served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs offload-moe[ray]"),
    pytest.mark.filterwarnings("ignore"),  # of Ray's
]

LIMIT_S = 300
NUM_CLIENTS = 6
MEMORY = {"ram": "1GiB", "context": 2048}
FLAGS = ["--ram", "1GiB", "--context", "2048", "--parallel", "2"]
WORDS = ["sea", "ship", "ice", "map", "salt", "bread", "moss", "glass"]


def body_of(word: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Tell me about the {word}. " * 20}]
    return {
        "model": "x",
        "messages": messages,
        "top_k": 40,
        "temperature": 1.3,
        "seed": 7,
        "max_tokens": 150,
        "ignore_eos": True,
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("replicated"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def expected(store: Path) -> dict[str, str]:
    """The answers of one server alone, one after another."""
    with load(store, **MEMORY) as model, served(model, parallel=1) as client:
        return {word: chat(client, **body_of(word))["choices"][0]["message"]["content"] for word in WORDS}


@pytest.fixture
def cluster(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes; the first one is the head, which the ingress connects to."""
    from ray.cluster_utils import Cluster

    for name, value in environment(store.parent, RAY_memory_monitor_refresh_ms="0").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()


class Ingress:
    """`serve --ray` as a process."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self.process, self.port = process, port

    def request(self, path: str, body: Any = None) -> tuple[int, str]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST" if body else "GET", path, body and json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def num_replicas(self) -> int:
        return int(json.loads(self.request("/health")[1])["replicas"])

    def series(self, name: str) -> float:
        """The sum over all replicas."""
        lines = [line for line in self.request("/metrics")[1].splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@contextmanager
def serving(store: Path, address: str) -> Iterator[Ingress]:
    log = store.parent / "ingress.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", INSTALLED, "serve", str(store), "--ray", "--port", "0", *FLAGS],
            cwd=ROOT,
            env=environment(store.parent, RAY_ADDRESS=address),
            stdout=file,
            stderr=file,
        )
    try:
        wait_for("the ingress", lambda: READY.search(log.read_text()) is not None or process.poll() is not None)
        found = READY.search(log.read_text())
        assert found is not None, log.read_text()
        yield Ingress(process, int(found[2]))
    finally:
        process.kill()
        process.wait()
        print(log.read_text())


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    end_at = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_at, f"not within {LIMIT_S} s: {what}"
        time.sleep(0.1)


class Clients:
    """Threads that send requests, streamed and whole ones, until they are stopped."""

    def __init__(self, ingress: Ingress, expected: dict[str, str]) -> None:
        self._ingress, self._expected = ingress, expected
        self._stop = threading.Event()
        self.outcomes, self.problems = Counter[str](), list[BaseException]()
        self._threads = [threading.Thread(target=self._act, args=(n,), daemon=True) for n in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def go_on(self) -> None:
        """Until every kind of answer has come some more times."""
        least = {kind: self.outcomes[kind] + 4 for kind in ("whole", "sse")}
        wait_for("answers", lambda: bool(self.problems) or all(self.outcomes[kind] >= least[kind] for kind in least))
        assert not self.problems, self.problems[0]

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
        assert not any(thread.is_alive() for thread in self._threads)
        assert not self.problems, self.problems[0]

    def _act(self, number: int) -> None:
        try:
            for turn in range(10**9):
                if self._stop.is_set():
                    return
                word = WORDS[(number + turn) % len(WORDS)]
                self.outcomes[self._whole(word) if number % 2 else self._streamed(word)] += 1
        except BaseException as error:
            self.problems.append(error)

    def _whole(self, word: str) -> str:
        status, text = self._ingress.request("/v1/chat/completions", body_of(word))
        assert status == 200, text
        assert json.loads(text)["choices"][0]["message"]["content"] == self._expected[word]
        return "whole"

    def _streamed(self, word: str) -> str:
        """The answer, or a beginning of it and the error of a lost replica."""
        status, text = self._ingress.request("/v1/chat/completions", body_of(word) | {"stream": True})
        assert status == 200, text
        *chunks, last = events(text)
        assert len({chunk["id"] for chunk in chunks if "id" in chunk}) == 1
        deltas = [choice["delta"] for chunk in chunks for choice in chunk.get("choices", ())]
        answer = "".join(delta.get("content") or "" for delta in deltas)
        if last == "[DONE]":
            assert answer == self._expected[word]
            return "sse"
        assert last["error"]["code"] == "replica_lost", last
        assert answer
        assert self._expected[word].startswith(answer)
        return "lost"


def replica_of(node: Any) -> psutil.Process:
    """The process of the replica on a node."""
    return next(process for process in node_processes(node) if "Replica" in " ".join(process.cmdline()))


def node_processes(node: Any) -> list[psutil.Process]:
    [raylet] = node.all_processes["raylet"]
    return psutil.Process(raylet.process.pid).children(recursive=True)


def test_a_node_is_killed_under_load(cluster: Any, store: Path, expected: dict[str, str]) -> None:
    second = cluster.add_node(num_cpus=1)
    with serving(store, cluster.address) as ingress:
        wait_for("2 replicas", lambda: ingress.num_replicas() == 2)
        clients = Clients(ingress, expected)
        clients.go_on()

        replica_of(second).kill()  # another one takes its place
        wait_for("a loss", lambda: ingress.series("offload_moe_ingress_lost_total") > 0)
        wait_for("2 replicas", lambda: ingress.num_replicas() == 2)
        clients.go_on()

        left = node_processes(second)
        cluster.remove_node(second, allow_graceful=False)
        wait_for("1 replicas", lambda: ingress.num_replicas() == 1)
        psutil.wait_procs(left, timeout=LIMIT_S)
        assert not any(process.is_running() for process in left)
        clients.go_on()

        cluster.add_node(num_cpus=1)
        wait_for("2 replicas", lambda: ingress.num_replicas() == 2)
        before = ingress.series("offload_moe_requests_total")
        clients.go_on()
        clients.end()

        assert clients.outcomes["lost"] <= 2 * NUM_CLIENTS
        assert ingress.series("offload_moe_requests_total") > before
        wait_for("the end of all requests", lambda: ingress.series("offload_moe_requests_running") == 0)
        assert ingress.series("offload_moe_ingress_known_characters_total") > 0
        os.kill(ingress.process.pid, signal.SIGINT)
        assert ingress.process.wait(LIMIT_S) == 130


def test_a_model_that_no_node_can_load_is_said_at_once(cluster: Any, store: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED, "serve", str(tmp_path / "nothing"), "--ray", "--port", "0"],
        cwd=ROOT,
        env=environment(store.parent, RAY_ADDRESS=cluster.address),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "nothing is neither a file or folder" in done.stderr
    assert "Traceback" not in done.stderr.rpartition("error: ")[2]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:10001", "127.0.0.1:port"])
def test_an_address_where_no_ray_is_is_said_at_once(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert load_cli().main(["serve", "demo", "--ray", "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith(f"error: Cannot reach Ray at {address}: ")
