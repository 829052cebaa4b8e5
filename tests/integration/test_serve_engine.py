"""Many requests at once: order, turns, cancellation, kept caches, unloading, the end, and the live data."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from offload_moe import load
from offload_moe.engine.model import Model
from offload_moe.serve.app import App, make_app
from offload_moe.serve.config import ServeConfig
from offload_moe.serve.host import Host
from tests.support.serving import HELLO, URL, chat, events, listening, open_tiny, served, slowly

LIMIT_S = 20
LONG = {"model": "x", "messages": HELLO, "max_tokens": 4000, "temperature": 0, "ignore_eos": True}
PROMPTS = [
    f"Tell me about {word}, please."
    for word in ["the sea", "a ship", "ice", "old maps", "salt", "bread", "moss", "glass"]
]


@pytest.fixture(scope="module", params=[None, 4], ids=["resident", "from disk"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_tiny(tmp_path_factory.mktemp("store"), request.param) as model:
        yield model


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def ask(address: tuple[str, int], text: str, **fields: Any) -> str:
    body = {"model": "x", "messages": [{"role": "user", "content": text}], "max_tokens": 20, "temperature": 0} | fields
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer["choices"][0]["message"]["content"]


def live(address: tuple[str, int]) -> Any:
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("GET", "/live")
    found = json.loads(connection.getresponse().read())
    connection.close()
    return found


@contextmanager
def begun(
    address: tuple[str, int], path: str = "/v1/chat/completions", **fields: Any
) -> Iterator[http.client.HTTPResponse]:
    """A stream whose client leaves at the end of the context."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    body = json.dumps(LONG | {"stream": True} | fields)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    try:
        yield response
    finally:
        response.close()
        connection.close()


def test_answers_at_once_are_those_of_one_after_the_other(model: Model) -> None:
    with listening(model, parallel=4, cache_slots=0) as address:

        def ask_drawn(prompt: str) -> str:
            return ask(address, prompt, temperature=1.3, seed=PROMPTS.index(prompt))

        expected = [ask_drawn(prompt) for prompt in PROMPTS]
        assert len(set(expected)) == len(PROMPTS)
        with ThreadPoolExecutor(8) as pool:
            for _ in range(2):
                assert list(pool.map(ask_drawn, PROMPTS)) == expected


def test_with_kept_caches_too(model: Model) -> None:
    """Greedy: a prompt behind a kept cache differs in last bits alone."""
    with listening(model, parallel=3, cache_slots=6) as address:
        expected = [ask(address, prompt) for prompt in PROMPTS]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda prompt: ask(address, prompt), PROMPTS)) == expected


def test_a_client_that_leaves_ends_its_answer(model: Model) -> None:
    with listening(model) as address:
        with begun(address) as response:
            response.read(300)
            assert live(address)["requests"]["running"] == 1
        wait_for(lambda: live(address)["requests"]["cancelled"] == 1)
        now = live(address)
        assert now["running"] == []
        assert now["tokens"]["generated"] < 4000
        assert ask(address, "Still there?")


def test_a_client_that_leaves_without_a_stream_too(model: Model) -> None:
    with listening(model) as address:
        connection = http.client.HTTPConnection(*address, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(LONG), {"Content-Type": "application/json"})
        wait_for(lambda: live(address)["running"])
        connection.close()
        wait_for(lambda: live(address)["requests"]["cancelled"] == 1)


def test_a_client_that_leaves_in_a_prompt_ends_it_at_the_next_layer(model: Model) -> None:
    layers: list[int] = []

    def slow(*_: Any) -> None:
        layers.append(1)
        time.sleep(0.3)

    handle = model.hf.model.layers[1].register_forward_pre_hook(slow)
    try:
        with listening(model, silence_s=0.05) as address:
            with begun(address, messages=[{"role": "user", "content": "x" * 900}]) as response:
                assert response.status == 200
            wait_for(lambda: live(address)["requests"]["cancelled"] == 1)
            assert live(address)["tokens"] == {"prompt": 0, "cached": 0, "generated": 0}
            assert len(layers) <= 2
    finally:
        handle.remove()


def test_a_client_that_leaves_the_queue_is_never_computed(model: Model) -> None:
    with slowly(model), listening(model, silence_s=0.05) as address, begun(address) as first:
        first.read(100)
        with begun(address) as second:
            assert second.readline().startswith(b":")  # a comment, while it waits
            assert live(address)["requests"]["waiting"] == 1
        wait_for(lambda: live(address)["requests"]["waiting"] == 0)
        assert len(live(address)["running"]) == 1


def test_a_full_queue_says_when_to_come_back(model: Model) -> None:
    with slowly(model), listening(model, queue=0) as address, begun(address) as first:
        first.read(100)
        with begun(address) as second:
            assert second.status == 429
            assert int(second.headers["Retry-After"]) >= 1
            assert json.loads(second.read())["error"]["type"] == "rate_limit_error"
        assert live(address)["requests"]["refused"] == 1


def test_a_client_that_does_not_read_holds_nothing(model: Model) -> None:
    with listening(model) as address, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(address)
        body = json.dumps(LONG | {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 150}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: live(address)["running"])
        assert ask(address, "And who reads this?")
        assert live(address)["requests"]["finished"] == 2


def test_a_model_that_is_never_used_is_unloaded_too(model: Model) -> None:
    host = Host(lambda: pytest.fail("loads"), ServeConfig(keep_alive_s=0.1), "tiny")
    host.adopt(load(Path(model.store.path), context=64))
    assert host.state == "ok"
    wait_for(lambda: host.state == "unloaded")
    host.close()


def test_a_request_that_comes_while_a_model_is_unloaded_keeps_it(model: Model) -> None:
    """Between the look at who uses the model and its end."""
    host = Host(lambda: pytest.fail("loads"), ServeConfig(), "tiny")
    host.adopt(model)
    loaded = host.loaded

    class Meanwhile(int):
        looks = 0

        def __bool__(self) -> bool:
            Meanwhile.looks += 1
            return Meanwhile.looks > 1

    host.num_users = Meanwhile()
    host.unload_when_idle()
    assert host.loaded is loaded
    assert model.engine.hierarchy.lifecycle.is_open
    host.worker.close()


def test_answers_go_on_between_the_parts_of_a_long_prompt(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.chat.prompt_chunks.CPU_PROMPT_TOKENS", 32)
    sizes: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["input_ids"].shape[1])

    with slowly(model), listening(model, parallel=2) as address, begun(address) as first:
        first.read(100)
        handle = model.hf.register_forward_pre_hook(note, with_kwargs=True)
        ask(address, "y" * 1000, max_tokens=1)
        handle.remove()
    parts = [at for at, size in enumerate(sizes) if size == 32]
    assert len(parts) > 20
    assert all(after - before > 1 for before, after in pairwise(parts))


def test_long_conversations_survive_requests_on_the_side(model: Model) -> None:
    with served(model, cache_slots=3) as client:
        messages = [{"role": "user", "content": "x" * 300}]
        for _ in range(2):
            said = chat(client, messages)["choices"][0]["message"]
            messages += [{"role": "assistant", "content": said["content"]}, {"role": "user", "content": "On."}]
        for number in range(6):
            chat(client, [{"role": "user", "content": f"{number} is the title of this chat, is it not?"}])
        usage = chat(client, messages)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 300
        kept = client.get("/live").json()["prefixes"]
        assert kept["kept"] <= 3
        assert 0 < kept["tokens"] <= kept["budget_tokens"]


def test_silent_streams_are_kept_alive_in_each_apis_way(model: Model) -> None:
    def slow(*_: Any) -> None:
        time.sleep(0.2)

    handle = model.hf.model.layers[0].register_forward_pre_hook(slow)
    try:
        with served(model, silence_s=0.03) as client:
            body = {"model": "x", "messages": HELLO, "max_tokens": 1, "stream": True}
            assert "\n: waiting\n" in "\n" + client.post("/v1/chat/completions", json=body).text
            assert '"type":"ping"' in client.post("/v1/messages", json=body).text
            asked = {"model": "x", "input": "Hello!", "max_output_tokens": 1, "stream": True}
            kinds = [event["type"] for event in events(client.post("/v1/responses", json=asked).text)]
            assert kinds.count("response.in_progress") > 1
            assert kinds.count("response.created") == 1
    finally:
        handle.remove()


def test_the_live_data_has_every_expert(model: Model) -> None:
    with served(model) as client:
        chat(client)
        now = client.get("/live").json()
        assert [len(row) for row in now["residency"]] == [8, 8]
        assert sum(row.count("1") for row in now["residency"]) == now["slots"]["ram"]["resident"]
        assert [len(row) for row in now["uses"]] == [8, 8]
        assert now["experts"]["hits"] + now["experts"]["misses"] > 0
        assert now["tokens"]["generated"] == 8
        assert {"dense weights", "expert slots in RAM"} < now["memory"].keys()
        props = client.get("/props").json()
        assert (props["context"], props["has_reasoning"], props["sampling"]["temperature"]) == (4096, False, 0)


def test_metrics_are_prometheus_text(model: Model) -> None:
    with served(model) as client:
        chat(client)
        text = client.get("/metrics").text
    line = re.compile(r'[a-z_]+(\{[a-z]+="[^"]+"(,[a-z]+="[^"]+")*\})? [0-9.e+-]+')
    samples = [each for each in text.splitlines() if not each.startswith("#")]
    assert all(line.fullmatch(each) for each in samples)
    assert 'offload_moe_requests_total{outcome="finished"} 1' in samples
    assert 'offload_moe_tokens_total{kind="generated"} 8' in samples
    assert "offload_moe_first_token_seconds_count 1" in samples
    found = [float(each.rpartition(" ")[2]) for each in samples if 'tier_experts_total{tier="ram"' in each]
    assert len(found) == 3
    assert sum(found) > 0


def test_an_idle_model_is_unloaded_and_loaded_again(model: Model) -> None:
    loads: list[Model] = []

    def open_again() -> Model:
        loads.append(load(Path(model.store.path), context=4096))
        return loads[-1]

    app = App(Host(open_again, ServeConfig(keep_alive_s=0.2), "tiny"))
    with TestClient(app, base_url=URL) as client:
        assert client.get("/health").json()["status"] == "unloaded"
        assert client.get("/live").json()["residency"] == []
        first = chat(client)
        assert client.get("/health").json()["status"] == "ok"
        wait_for(lambda: client.get("/health").json()["status"] == "unloaded")
        counted = client.get("/live").json()
        assert counted["experts"]["hits"] > 0
        assert not loads[0].engine.hierarchy.lifecycle.is_open
        again = chat(client)
        assert again["choices"] == first["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert len(loads) == 2
        assert client.get("/live").json()["experts"]["hits"] > counted["experts"]["hits"]
    app.close()
    assert not loads[1].engine.hierarchy.lifecycle.is_open


def test_health_answers_while_a_model_loads(model: Model) -> None:
    gate = threading.Event()

    def slow() -> Model:
        assert gate.wait(LIMIT_S)
        return load(Path(model.store.path), context=4096)

    app = App(Host(slow, ServeConfig(silence_s=0.05), "tiny"))
    with TestClient(app, base_url=URL) as client, ThreadPoolExecutor(1) as pool:
        body = {"model": "x", "messages": HELLO, "max_tokens": 2, "stream": True}
        answer = pool.submit(client.post, "/v1/chat/completions", json=body)
        wait_for(lambda: client.get("/health").json()["status"] == "loading")
        time.sleep(1.2)
        gate.set()
        text = answer.result(LIMIT_S).text
        assert text.startswith(": loading")
        assert events(text)[-1] == "[DONE]"
    app.close()


def test_draining_lets_answers_end_and_refuses_new_ones(model: Model) -> None:
    app = make_app(model, name="tiny")
    with TestClient(app, base_url=URL) as client, ThreadPoolExecutor(2) as pool:
        answer = pool.submit(client.post, "/v1/chat/completions", json=LONG | {"max_tokens": 100})
        wait_for(lambda: client.get("/live").json()["running"])
        drained = pool.submit(app.host.drain, LIMIT_S)
        wait_for(lambda: client.get("/health").status_code == 503)
        refused = client.post("/v1/chat/completions", json=LONG)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert answer.result(LIMIT_S).json()["usage"]["completion_tokens"] == 100
        assert drained.result(LIMIT_S)
    app.close()
    assert not [each for each in threading.enumerate() if each.name == "offload-moe engine"]
    assert model.generate(HELLO, max_new_tokens=2)  # which stays the caller's


def test_closing_ends_what_runs_and_what_waits(model: Model) -> None:
    app = make_app(model, ServeConfig(silence_s=0.05), name="tiny")
    with TestClient(app, base_url=URL) as client, ThreadPoolExecutor(2) as pool:
        running = pool.submit(client.post, "/v1/chat/completions", json=LONG | {"stream": True})
        wait_for(lambda: client.get("/live").json()["running"])
        waiting = pool.submit(client.post, "/v1/chat/completions", json=LONG)
        wait_for(lambda: client.get("/live").json()["requests"]["waiting"])
        app.close()
        assert events(running.result(LIMIT_S).text)[-1]["error"]["code"] == "shutting_down"
        assert waiting.result(LIMIT_S).status_code == 503


def test_it_may_be_mounted_below_a_path(model: Model) -> None:
    app = make_app(model, ServeConfig(api_key="sesame"), name="tiny")
    with TestClient(Starlette(routes=[Mount("/llm", app)]), base_url=URL) as client:
        assert client.get("/llm/health").status_code == 200
        assert client.get("/llm/v1/models").status_code == 401
        client.headers["x-api-key"] = "sesame"
        assert client.get("/llm/v1/models").json()["data"][0]["id"] == "tiny"
        body = {"model": "x", "messages": HELLO, "max_tokens": 2}
        assert client.post("/llm/v1/chat/completions", json=body).status_code == 200
        assert client.post("/llm/v1/messages", json=body | {"max_tokens": "x"}).json()["type"] == "error"
    app.close()
