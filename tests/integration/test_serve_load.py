"""Many clients for a while, well and badly behaved: no leak, nothing stuck, no answer in another's window.

`OFFLOAD_MOE_LOAD_S` is how long, in seconds; ten minutes before a release.
"""

import contextlib
import gc
import http.client
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

import psutil
import pytest

from offload_moe.plan.budget import give_back_freed_memory
from tests.support.serving import listening, open_tiny

NUM_CLIENTS = 32
LOAD_S = float(os.environ.get("OFFLOAD_MOE_LOAD_S", "60"))
WARM_UP = 0.4  # of the time
Address = tuple[str, int]
Answers = dict[str, str]
WORDS = ["sea", "ship", "ice", "map", "salt", "bread", "moss", "glass"]


def post(address: Address, body: bytes, *, num_lines: int | None = None) -> tuple[int, bytes]:
    """The status and the answer; of a stream, so many lines before the client leaves."""
    connection = http.client.HTTPConnection(*address, timeout=120)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if num_lines is None:
            return response.status, response.read()
        for _ in range(num_lines):
            response.readline()
        response.close()
        return response.status, b""


def body_of(word: str, **fields: object) -> bytes:
    messages = [{"role": "user", "content": f"Tell me about the {word}."}]
    return json.dumps(
        {"model": "x", "messages": messages, "top_k": 40, "temperature": 1.3, "seed": 7, "max_tokens": 8} | fields
    ).encode()


def ask(address: Address, expected: Answers) -> str:
    word = random.choice(WORDS)
    status, body = post(address, body_of(word))
    if status == 429:
        time.sleep(0.2)
        return "refused"
    assert status == 200, body
    assert json.loads(body)["choices"][0]["message"]["content"] == expected[word]
    return "answered"


def leave(address: Address, expected: Answers) -> str:
    post(address, body_of("sea", stream=True, max_tokens=500, ignore_eos=True), num_lines=random.randrange(6))
    return "left"


def send_nonsense(address: Address, expected: Answers) -> str:
    body = random.choice([b"{", b"[]", b'{"model": 1}', b"\x00" * 100, b'{"a":' * 500])
    status, _ = post(address, body)
    assert status == 400
    return "nonsense"


def send_too_much(address: Address, expected: Answers) -> str:
    with contextlib.suppress(OSError):  # the server closes before it has read all
        status, _ = post(address, b" " * 300_000)
        assert status == 413
    return "too much"


def stay_silent(address: Address, expected: Answers) -> str:
    with socket.create_connection(address, timeout=10) as half_open:
        half_open.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
        time.sleep(random.random())
    return "silent"


DEEDS: list[Callable[[Address, Answers], str]] = [ask, ask, ask, leave, send_nonsense, send_too_much, stay_silent]


def rss() -> int:
    gc.collect()
    give_back_freed_memory()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.slow
def test_many_clients(tmp_path_factory: pytest.TempPathFactory) -> None:
    deeds, problems, memory = Counter[str](), list[BaseException](), list[int]()
    with (
        open_tiny(tmp_path_factory.mktemp("store"), 6) as model,
        listening(model, parallel=4, queue=16, cache_slots=8, max_body_bytes=100_000) as address,
    ):
        expected = {
            word: json.loads(post(address, body_of(word))[1])["choices"][0]["message"]["content"] for word in WORDS
        }
        assert len(set(expected.values())) > 4
        end_at = time.monotonic() + LOAD_S

        def act() -> None:
            try:
                while time.monotonic() < end_at:
                    deeds[random.choice(DEEDS)(address, expected)] += 1
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=act) for _ in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(WARM_UP * LOAD_S)
        while time.monotonic() < end_at:
            memory.append(rss())
            time.sleep(LOAD_S / 20)
        for thread in threads:
            thread.join(180)
        assert not problems, problems[0]
        assert not any(thread.is_alive() for thread in threads)
        assert post(address, body_of("sea"))[0] == 200
    early, late = memory[: len(memory) // 2], memory[len(memory) // 2 :]
    assert max(late) < 1.02 * max(early), memory
    assert min(deeds[deed] for deed in ("answered", "left", "nonsense", "silent")) > 10, deeds
