"""`/v1/chat/completions` and `/v1/completions` of a tiny model: answers, streams, parameters, usage, errors."""

import math
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from offload_moe.engine.model import Model
from offload_moe.errors import BudgetError
from tests.support.serving import HELLO, chat, events, served, slowly

SAMPLED = {"temperature": 1.3, "top_k": 40, "seed": 11, "max_tokens": 24}


def content(document: Any, choice: int = 0) -> str:
    return document["choices"][choice]["message"]["content"]


def stream(client: TestClient, **fields: Any) -> list[Any]:
    body = {"model": "tiny", "messages": HELLO, "stream": True, **SAMPLED} | fields
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response.text)


def refused(client: TestClient, path: str = "/v1/chat/completions", status: int = 400, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": HELLO} | fields
    if path == "/v1/completions":
        del body["messages"]
    response = client.post(path, json={name: value for name, value in body.items() if value is not ...})
    assert response.status_code == status, response.text
    return response.json()["error"]


@pytest.mark.parametrize("settings", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_is_that_of_generate(model: Model, settings: dict[str, Any]) -> None:
    ours = {name: value for name, value in settings.items() if name != "max_tokens"}
    expected = model.generate(HELLO, max_new_tokens=24, **ours)
    with served(model, cache_slots=0) as client:
        for _ in range(2):
            answer = chat(client, **(settings | {"max_tokens": 24}))
            assert content(answer) == expected
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_stream_is_the_same_answer(client: TestClient) -> None:
    whole = chat(client, **SAMPLED)
    parts = stream(client, stream_options={"include_usage": True})
    *chunks, last, done = parts
    assert done == "[DONE]"
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 24)
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == content(whole)
    assert [delta["delta"].get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert [delta["finish_reason"] for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in parts[:-1]}) == 1
    assert {chunk["model"] for chunk in parts[:-1]} == {"tiny"}


def test_no_usage_in_a_stream_unless_asked(client: TestClient) -> None:
    parts = stream(client)
    assert not any("usage" in part for part in parts[:-1])


def test_usage_counts_kept_tokens(model: Model) -> None:
    with served(model) as client:
        first = chat(client)["usage"]
        assert first["prompt_tokens_details"] == {"cached_tokens": 0, "audio_tokens": 0}
        assert first["total_tokens"] == first["prompt_tokens"] + first["completion_tokens"]
        second = chat(client)["usage"]
        assert second["prompt_tokens_details"]["cached_tokens"] == first["prompt_tokens"] - 1
        assert second["prompt_tokens"] == first["prompt_tokens"]


def test_a_kept_prefix_changes_no_answer(model: Model) -> None:
    with served(model) as client, served(model, cache_slots=0) as forgetful:
        said = content(chat(client))
        longer = [*HELLO, {"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
        assert content(chat(client, longer)) == content(chat(forgetful, longer))


def test_choices_differ_and_repeat_with_the_seed(client: TestClient) -> None:
    first, second = (chat(client, n=3, **SAMPLED) for _ in range(2))
    texts = [content(first, number) for number in range(3)]
    assert len(set(texts)) == 3
    assert texts == [content(second, number) for number in range(3)]
    assert texts[0] == content(chat(client, **SAMPLED))
    assert first["usage"]["completion_tokens"] == 3 * 24


def test_choices_are_those_of_generate_too(model: Model) -> None:
    with served(model, cache_slots=0) as client:
        answer = chat(client, n=2, **SAMPLED)
    ours = {"temperature": 1.3, "top_k": 40, "max_new_tokens": 24}
    assert [content(answer, number) for number in range(2)] == [
        model.generate(HELLO, seed=seed, **ours) for seed in (11, 12)
    ]


@pytest.mark.parametrize("error", [BudgetError("full"), torch.OutOfMemoryError("full")])
def test_an_answer_ends_where_memory_ends(client: TestClient, model: Model, error: Exception) -> None:
    num_left = 0

    def count(*_: Any) -> None:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise error

    handle = model.hf.get_decoder().register_forward_pre_hook(count)
    try:
        num_left = 4
        answer = chat(client, [{"role": "user", "content": "One of its own"}], max_tokens=20)
        assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 4)
        num_left = 0
        assert refused(client)["code"] == "context_length_exceeded"
    finally:
        handle.remove()
    assert chat(client)["usage"]["completion_tokens"] == 8


def test_without_a_seed_answers_differ(client: TestClient) -> None:
    unseeded = SAMPLED | {"seed": None}
    assert len({content(chat(client, **unseeded)) for _ in range(4)}) > 1


@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_strings_cut_the_answer_also_across_tokens(client: TestClient, length: int) -> None:
    whole = content(chat(client, **SAMPLED))
    at = next(at for at in range(4, 20) if whole.find(whole[at : at + length]) == at)
    stop = whole[at : at + length]  # one token per byte
    answer = chat(client, stop=["never", stop], **SAMPLED)
    assert content(answer) == whole[:at]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 24
    parts = stream(client, stop=stop)
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts[:-1]) == whole[:at]


def test_a_bias_forbids_and_forces_tokens(client: TestClient) -> None:
    plain = chat(client, max_tokens=4)
    forced = chat(client, max_tokens=4, logit_bias={"65": 100})
    assert content(forced) != content(plain)
    assert len(set(content(forced))) == 1
    forbidden = chat(client, max_tokens=4, logit_bias={str(token): -100 for token in range(60)})
    assert content(forbidden) != content(forced)


def test_penalties_change_the_answer(client: TestClient) -> None:
    plain = content(chat(client, max_tokens=40))
    for fields in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 3}):
        assert content(chat(client, max_tokens=40, **fields)) != plain


def test_min_p_of_one_is_greedy(client: TestClient) -> None:
    assert content(chat(client, temperature=1, min_p=1, seed=1)) == content(chat(client))
    assert content(chat(client, temperature=1, top_p=0, seed=1)) == content(chat(client))


def test_logprobs_are_those_of_the_model(client: TestClient) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=5)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == 5
    for entry in entries:
        top = entry["top_logprobs"]
        assert [each["logprob"] for each in top] == sorted((each["logprob"] for each in top), reverse=True)
        assert entry["logprob"] == top[0]["logprob"]  # greedy
        assert sum(math.exp(each["logprob"]) for each in top) < 1
    whole = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert whole.decode("utf-8", "replace") == content(answer)
    chosen = chat(client, logprobs=True, max_tokens=5)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in chosen] == [[]] * 5
    streamed = stream(client, logprobs=True, top_logprobs=3, temperature=0, max_tokens=5)
    found = [part["choices"][0]["logprobs"] for part in streamed[:-1]]
    assert [entry for each in found if each for entry in each["content"]] == entries


def test_completions_continue_texts_and_ids(client: TestClient, model: Model) -> None:
    body = {"model": "tiny", "prompt": "Once upon", "temperature": 0, "max_tokens": 6}
    answer = client.post("/v1/completions", json=body).json()
    text = answer["choices"][0]["text"]
    assert text == model.generate("Once upon", raw=True, temperature=0, max_new_tokens=6)
    ids = client.post("/tokenize", json={"content": "Once upon"}).json()["tokens"]
    assert client.post("/v1/completions", json=body | {"prompt": ids}).json()["choices"][0]["text"] == text
    assert client.post("/v1/completions", json=body | {"prompt": [ids]}).json()["choices"][0]["text"] == text
    echoed = client.post("/v1/completions", json=body | {"echo": True, "logprobs": 2}).json()["choices"][0]
    assert echoed["text"] == "Once upon" + text
    assert len(echoed["logprobs"]["tokens"]) == 6
    assert echoed["logprobs"]["text_offset"][0] == len("Once upon")
    asked = body | {"stream": True, "echo": True, "logprobs": 2}
    chunks = [part["choices"][0] for part in events(client.post("/v1/completions", json=asked).text)[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == echoed["text"]
    offsets = [offset for chunk in chunks if chunk["logprobs"] for offset in chunk["logprobs"]["text_offset"]]
    assert offsets == echoed["logprobs"]["text_offset"]


def test_texts_and_tokens(client: TestClient) -> None:
    ids = client.post("/tokenize", json={"content": "größer"}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"content": "größer"}
    rendered = client.post("/tokenize", json={"messages": HELLO}).json()
    assert rendered["count"] == chat(client)["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": ...}, "messages"),
        ({"model": ...}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": [1]}, "stop[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_fields_that_are_not_usable_are_named(client: TestClient, fields: dict[str, Any], param: str) -> None:
    error = refused(client, **fields)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "Hello!"},
    "/v1/responses": {"input": "Hello!"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 4},
}
WRONG: dict[str, Any] = {
    "temperature": "hot",
    "top_p": [],
    "top_k": "many",
    "min_p": {},
    "seed": "lucky",
    "frequency_penalty": "low",
    "presence_penalty": "low",
    "repetition_penalty": "low",
    "logit_bias": "none",
    "stream": 1,
    "metadata": "x",
    "user": {},
}


@pytest.mark.parametrize("path", PROMPTS)
def test_fields_are_checked_in_every_api(client: TestClient, path: str) -> None:
    for name, value in WRONG.items():
        body = {"model": "x", "max_tokens": 4, name: value} | PROMPTS[path]
        response = client.post(path, json=body)
        assert response.status_code == 400, (name, response.text)
        assert name in response.json()["error"]["message"]


@pytest.mark.parametrize("path", PROMPTS)
def test_sampling_is_the_same_in_every_api(client: TestClient, path: str) -> None:
    def text(**fields: Any) -> str:
        length = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        found = client.post(path, json={"model": "x", "temperature": 0} | PROMPTS[path] | {length: 24} | fields)
        assert found.status_code == 200, found.text
        match found.json():
            case {"choices": [{"message": {"content": said}}]} | {"choices": [{"text": said}]}:
                return said
            case {"output": [{"content": [{"text": said}]}]} | {"content": [{"text": said}]}:
                return said
            case document:
                raise AssertionError(document)

    greedy = text()
    assert text(temperature=1, min_p=1, seed=3) == greedy
    assert text(temperature=1, top_k=1) == greedy
    assert text(repetition_penalty=3) != greedy
    assert text(logit_bias={"65": 100}) != greedy


def test_a_prompt_that_does_not_fit_names_its_field(client: TestClient) -> None:
    long = "x" * 5000
    for path, field in (("/v1/completions", "prompt"), ("/v1/responses", "input")):
        error = client.post(path, json={"model": "x", field: long}).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", field)


def test_items_of_responses_may_be_odd(client: TestClient) -> None:
    said = {"role": "user", "content": "Hello!"}
    for item in ({"type": "reasoning", "content": 5, "summary": 7}, {"type": "reasoning", "summary": ["x"]}):
        body = {"model": "x", "input": [item, said], "max_output_tokens": 2}
        assert client.post("/v1/responses", json=body).status_code == 200
    for item, param in (
        ({"type": "web_search_call"}, "input[0]"),
        (
            {"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]},
            "input[0].content[0]",
        ),
        ({"role": "king", "content": "x"}, "input[0].role"),
    ):
        response = client.post("/v1/responses", json={"model": "x", "input": [item]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("kind", ["image", "document", "server_tool_use"])
def test_blocks_of_messages_that_are_no_text_are_refused_by_name(client: TestClient, kind: str) -> None:
    blocks = [{"type": "text", "text": "See:"}, {"type": kind, "source": {"type": "url", "url": "http://localhost/"}}]
    body = {"model": "x", "max_tokens": 2, "messages": [{"role": "user", "content": blocks}]}
    response = client.post("/v1/messages", json=body)
    assert response.status_code == 400
    assert f"messages[0].content[1] is of the type '{kind}'" in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_that_are_no_text_are_refused_by_name(client: TestClient, kind: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "http://169.254.169.254/"}}]
    error = refused(client, messages=[{"role": "user", "content": parts}])
    assert error["param"] == "messages[0].content[1]"
    assert kind in error["message"]


def test_content_may_be_parts(client: TestClient) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    assert content(chat(client, [{"role": "user", "content": parts}])) == content(chat(client))


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(client: TestClient) -> None:
    error = refused(client, messages=[{"role": "user", "content": "word " * 1000}])
    assert error["code"] == "context_length_exceeded"
    assert "4096 tokens" in error["message"]
    assert "5019 tokens" in error["message"]
    assert refused(client, stream=True, messages=[{"role": "user", "content": "word " * 1000}]) == error


def test_an_answer_ends_at_the_end_of_the_context(client: TestClient) -> None:
    messages = [{"role": "user", "content": "x" * 4060}]
    answer = chat(client, messages, max_tokens=500)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 4096


def test_a_suffix_is_refused_by_name(client: TestClient) -> None:
    error = refused(client, "/v1/completions", prompt="def f(", suffix=")")
    assert (error["param"], "suffix" in error["message"]) == ("suffix", True)


def test_unknown_fields_are_ignored_and_logged(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert content(chat(client, service_tier="auto", metadata={"a": "b"}, x=1)) == content(chat(client))
    assert "Ignored: 'service_tier, x'" in caplog.text


def test_any_model_name_is_taken_unless_told_otherwise(model: Model, client: TestClient) -> None:
    assert chat(client, model="gpt-7")["model"] == "tiny"
    with served(model, is_strict_model=True) as strict:
        assert refused(strict, status=404, model="gpt-7")["code"] == "model_not_found"
        assert chat(strict, model="tiny")["model"] == "tiny"
        assert strict.get("/v1/models/tiny").json()["id"] == "tiny"
        assert strict.get("/v1/models/other").status_code == 404


def test_the_beginning_of_the_first_message_may_be_ignored(model: Model) -> None:
    with served(model, ignore_prefix=r"x-billing: \w+\n") as client:
        for number in range(2):
            system = {"role": "system", "content": f"x-billing: {number}a\nBe brief."}
            usage = chat(client, [system, *HELLO])["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_paths_and_methods_that_are_not_there(client: TestClient) -> None:
    assert client.get("/v1/engines").status_code == 404
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.post("/v1/responses/compact", json={}).status_code == 404
    for path in ("/v1/engines", "/v1/chat/completions"):
        assert set(client.get(path).json()["error"]) == {"message", "type", "param", "code"}


def test_progress_of_a_prompt_is_shown_where_asked_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_moe.chat.prompt_chunks.CPU_PROMPT_TOKENS", 16)  # 8 and fewer are one native pass
    monkeypatch.setattr("offload_moe.serve.delivery.FIRST_S", 0.0)
    with slowly(model), served(model, silence_s=0.001) as client:
        parts = stream(client, return_progress=True, messages=[{"role": "user", "content": "x" * 400}], max_tokens=2)
    shown = [part["prompt_progress"] for part in parts[:-1] if "prompt_progress" in part]
    assert len(shown) > 1
    assert [each["processed"] for each in shown] == sorted(each["processed"] for each in shown)
    assert all(each["total"] == 419 and each["cache"] == 0 for each in shown)
