"""Requests that are answered at once share passes: each gets the document it gets alone, whatever it sets."""

import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from offload_moe.engine.model import Model
from offload_moe.native.kernels import MAX_ROWS
from offload_moe.serve.app import make_app
from offload_moe.serve.board import Board
from offload_moe.serve.config import ServeConfig
from offload_moe.speculate.row_governor import RowGovernor
from offload_moe.speculate.speculation import speculation_of
from tests.support.serving import SCHEMA_OF_NAMES, chat, open_tiny, running, served

FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.5, "seed": 5, "logit_bias": {"97": 6}},
    "stop": {"stop": ["a", "e"], "temperature": 0.9, "seed": 1},
    "penalties": {"frequency_penalty": 0.02, "presence_penalty": 0.1, "logit_bias": {"97": 2}},
    "log probabilities": {"logprobs": True, "top_logprobs": 3},
    "two choices": {"n": 2, "temperature": 1, "seed": 1, "max_tokens": 20},
    "grammar": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "names", "schema": SCHEMA_OF_NAMES}}
    },
}


@pytest.fixture(scope="module", params=[None, 4], ids=["resident", "from disk"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_tiny(tmp_path_factory.mktemp("store"), request.param) as model:
        yield model


@pytest.fixture(autouse=True)
def always_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowGovernor, "choose", lambda self, most: min(most, MAX_ROWS))
    monkeypatch.setattr(RowGovernor, "rate", lambda self, num_rows: float(num_rows))


def messages_of(name: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell me of {name}, please."}]


def test_every_request_gets_what_it_gets_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation_of(model.hf), "choice", "off")
    limits = {"max_tokens": 60}
    with served(model, cache_slots=0) as client:
        alone = {name: chat(client, messages_of(name), **limits | fields) for name, fields in FIELDS.items()}
    app = make_app(model, ServeConfig(parallel=len(FIELDS), cache_slots=0), name="tiny")
    before, gate = model.stats.copy(), threading.Event()
    with running(app) as address, ThreadPoolExecutor(len(FIELDS)) as pool:
        app.host.worker.call(lambda: gate.wait(60))  # until all of them wait
        asked = {name: pool.submit(ask, address, name, limits | fields) for name, fields in FIELDS.items()}
        while app.host.worker.num_waiting < len(FIELDS):
            assert not any(each.done() for each in asked.values())
        gate.set()
        got = {name: each.result(60) for name, each in asked.items()}
        live, metrics = fetch(address, "/live"), fetch(address, "/metrics")
    app.close()
    for name, document in got.items():
        assert document["choices"] == alone[name]["choices"], name
        assert document["usage"]["completion_tokens"] == alone[name]["usage"]["completion_tokens"] > 1
    seen = model.stats.since(before)
    assert seen.rows_per_pass > 2
    assert json.loads(live)["passes"] == {"number": model.stats.num_passes, "rows": model.stats.num_rows}
    assert f"offload_moe_decode_passes_total {model.stats.num_passes}\n" in metrics
    assert f"offload_moe_decode_rows_total {model.stats.num_rows}\n" in metrics
    timings = [document["timings"] for document in got.values()]
    assert sum(each["hits"] + each["misses"] for each in timings) == seen.num_accesses
    assert all(each["hits"] + each["misses"] > 0 for each in timings)


def ask(address: tuple[str, int], name: str, fields: dict[str, Any]) -> Any:
    body = {"model": "tiny", "messages": messages_of(name), "temperature": 0} | fields
    return json.loads(fetch(address, "/v1/chat/completions", json.dumps(body)))


def fetch(address: tuple[str, int], path: str, body: str | None = None) -> str:
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "application/json"})
    text = connection.getresponse().read().decode()
    connection.close()
    return text


@pytest.mark.parametrize(("chosen", "is_paying", "expected"), [(None, True, 4), (None, False, 1), (3, False, 3)])
def test_requests_come_one_after_another_where_sharing_does_not_pay(
    model: Model, chosen: int | None, is_paying: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number of the user's own is answered in turn, whatever pays."""
    monkeypatch.setattr(RowGovernor, "pays", property(lambda self: is_paying))
    app = make_app(model, ServeConfig(parallel=chosen, cache_slots=0), name="tiny")
    seen, gate, end = set[int](), threading.Event(), Board.end

    def noted_end(self: Board, *arguments: Any) -> None:
        seen.add(app.host.worker.num_running)
        end(self, *arguments)

    monkeypatch.setattr(Board, "end", noted_end)
    with running(app) as address, ThreadPoolExecutor(5) as pool:
        app.host.worker.call(lambda: gate.wait(60))
        asked = [pool.submit(ask, address, name, {"max_tokens": 12, "ignore_eos": True}) for name in "abcde"]
        while app.host.worker.num_waiting < len(asked):
            assert not any(each.done() for each in asked)
        gate.set()
        assert all(each.result(60)["usage"]["completion_tokens"] == 12 for each in asked)
    app.close()
    assert max(seen) == expected
