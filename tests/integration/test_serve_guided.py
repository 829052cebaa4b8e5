"""Structured output and tools, through a tiny model that knows nothing: only the grammar makes its answers right."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from offload_moe.engine.model import Model
from tests.support.serving import HELLO, chat, events

COLOURS = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "is_warm": {"type": "boolean"},
        "levels": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3},
    },
    "required": ["colour", "is_warm", "levels"],
    "additionalProperties": False,
}
PAINT = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": COLOURS}}
WASH = {"type": "function", "function": {"name": "wash", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "paint", "arguments": {"colour": "red", "is_warm": true}}\n</tool_call>'


def message(document: Any) -> Any:
    return document["choices"][0]["message"]


def is_painted(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) == set(COLOURS["properties"]) and value["colour"] in ("red", "green") and len(value["levels"]) >= 2
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": 5, "seed": 3}], ids=["greedy", "hot"])
def test_a_schema_is_enforced(client: TestClient, settings: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "colours", "schema": COLOURS, "strict": True}}
    answer = chat(client, response_format=wanted, max_tokens=120, **settings)
    assert is_painted(message(answer)["content"])
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_runs_of_forced_tokens_are_computed_at_once(client: TestClient, model: Model) -> None:
    sizes: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["input_ids"].shape[1])

    handle = model.hf.register_forward_pre_hook(count, with_kwargs=True)
    wanted = {"type": "json_schema", "json_schema": {"name": "colours", "schema": COLOURS}}
    chat(client, [{"role": "user", "content": "A prompt of its own"}], response_format=wanted, max_tokens=120)
    handle.remove()
    assert max(sizes[1:]) >= len('"is_warm": ')


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ("yes", "no")),
        ({"structured_outputs": {"regex": "(ab){2}c"}}, ("ababc",)),
        ({"grammar": 'root ::= "left" | "right"'}, ("left", "right")),
        ({"grammar": 'start: "up" | "down"'}, ("up", "down")),
    ],
)
def test_grammars_of_other_servers(client: TestClient, fields: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert message(chat(client, max_tokens=40, **fields))["content"] in expected


def test_completions_are_guided_too(client: TestClient) -> None:
    body = {"model": "tiny", "prompt": "It is", "max_tokens": 40, "structured_outputs": {"choice": ["so", "not so"]}}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] in ("so", "not so")


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "http://example.com/schema.json"}, {"type": "string", "pattern": "("}]
)
def test_a_schema_that_cannot_be_compiled_is_refused_with_its_words(client: TestClient, schema: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = client.post("/v1/chat/completions", json={"model": "x", "messages": HELLO, "response_format": wanted})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "response_format.json_schema.schema")
    assert "cannot be compiled: " in error["message"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_call_may_be_required(client: TestClient, choice: Any) -> None:
    tools = [PAINT] if choice == "required" else [WASH, PAINT]
    answer = chat(client, tools=tools, tool_choice=choice, max_tokens=200)
    said = message(answer)
    assert said["content"] is None
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    [call] = said["tool_calls"]
    assert call["function"]["name"] == "paint"
    assert is_painted(call["function"]["arguments"])


def test_one_of_several_tools_may_be_required(client: TestClient) -> None:
    [call] = message(chat(client, tools=[WASH, PAINT], tool_choice="required", max_tokens=200))["tool_calls"]
    assert call["function"]["name"] in ("wash", "paint")


def test_calls_stream_with_their_name_once(client: TestClient, say: Any) -> None:
    say("I will. " + CALL)
    body = {"model": "x", "messages": HELLO, "tools": [PAINT], "stream": True, "temperature": 0}
    deltas = [part["choices"][0] for part in events(client.post("/v1/chat/completions", json=body).text)[:-1]]
    calls = [call for delta in deltas for call in delta["delta"].get("tool_calls", ())]
    assert [call["function"].get("name") for call in calls] == ["paint"] + [None] * (len(calls) - 1)
    assert [call.get("id") is not None for call in calls] == [True] + [False] * (len(calls) - 1)
    assert {call["index"] for call in calls} == {0}
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(arguments) == {"colour": "red", "is_warm": True}
    assert len(calls) > 5
    assert "".join(delta["delta"].get("content") or "" for delta in deltas) == "I will. "
    assert deltas[-1]["finish_reason"] == "tool_calls"


def test_text_that_is_no_call_stays_text(client: TestClient, say: Any) -> None:
    said = '<tool_call>{"name": "launch", "arguments": {}}</tool_call> and <tool_call> alone'
    say(said)
    answer = chat(client, tools=[PAINT], max_tokens=200)
    assert message(answer)["content"] == said
    assert "tool_calls" not in message(answer)
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_tools_may_be_off(client: TestClient, say: Any) -> None:
    say(CALL)
    answer = chat(client, tools=[PAINT], tool_choice="none", max_tokens=200)
    assert message(answer)["content"] == CALL


def test_only_one_call_where_they_may_not_be_parallel(client: TestClient, say: Any) -> None:
    say(CALL + "\n" + CALL)
    assert len(message(chat(client, tools=[PAINT], max_tokens=300))["tool_calls"]) == 2
    say(CALL + "\n" + CALL)
    answer = chat(client, tools=[PAINT], max_tokens=300, parallel_tool_calls=False)
    assert len(message(answer)["tool_calls"]) == 1


def test_arguments_of_a_strict_tool_follow_its_schema(client: TestClient, say: Any) -> None:
    say('<tool_call>\n{"name": "paint", "arguments": {"blue": 7}}\n</tool_call>')
    strict = {"type": "function", "function": PAINT["function"] | {"strict": True}}
    [call] = message(chat(client, tools=[strict], max_tokens=400))["tool_calls"]
    assert call["function"]["arguments"].startswith('{"colour": "')


def test_a_strict_tool_whose_schema_cannot_be_compiled_is_refused(client: TestClient) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "nonsense"}}}
    body = {"model": "x", "messages": HELLO, "tools": [tool], "stream": True}
    response = client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "tools")
    assert "cannot be compiled: " in error["message"]


def test_a_call_may_come_in_place_of_an_answer_with_a_schema(client: TestClient, say: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": COLOURS}}
    fields = {"tools": [WASH, PAINT], "response_format": wanted, "max_tokens": 300}
    say('<tool_call>\n{"name": "paint", "arguments": {"blue"')
    called = chat(client, **fields)["choices"][0]
    [call] = called["message"]["tool_calls"]
    assert (called["finish_reason"], call["function"]["name"]) == ("tool_calls", "paint")
    assert is_painted(call["function"]["arguments"])
    say('{"blue"')
    answered = chat(client, **fields)["choices"][0]
    assert answered["finish_reason"] == "stop"
    assert is_painted(answered["message"]["content"])


def test_a_conversation_with_calls_and_results(client: TestClient) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "paint", "arguments": '{"colour": "red"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "painted"},
    ]
    ids = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = client.post("/detokenize", json={"tokens": ids}).json()["content"]
    assert '<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call>' in text
    assert "<tool_response>\npainted\n</tool_response>" in text
    assert chat(client, messages, tools=[PAINT])["choices"][0]["finish_reason"] == "length"


def test_hosted_tools_are_dropped_and_custom_ones_take_a_text(client: TestClient) -> None:
    custom = {"type": "custom", "custom": {"name": "patch", "description": "A patch"}}
    tools = [{"type": "web_search"}, {"type": "code_interpreter", "container": {}}, custom]
    answer = chat(client, tools=tools, tool_choice={"type": "custom", "custom": {"name": "patch"}}, max_tokens=300)
    [call] = message(answer)["tool_calls"]
    assert call["type"] == "custom"
    assert call["custom"]["name"] == "patch"
    assert isinstance(call["custom"]["input"], str)


@pytest.mark.parametrize(
    "choice", [{"type": "web_search"}, {"type": "function", "name": "search"}, {"type": "mcp", "server_label": "x"}]
)
def test_a_choice_of_a_hosted_tool_is_dropped_too(
    client: TestClient, choice: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tools = [{"type": "web_search", "name": "search"}, {"type": "mcp", "server_label": "x"}, PAINT]
    assert chat(client, tools=tools, tool_choice=choice, max_tokens=4)["choices"][0]["finish_reason"] == "length"
    assert "hosted tool 'web_search' is not here" in caplog.text
    assert "tool_choice is a hosted tool" in caplog.text


def test_a_tool_that_is_not_offered_cannot_be_required(client: TestClient) -> None:
    for choice in ({"type": "function", "function": {"name": "launch"}}, "required"):
        body = {"model": "x", "messages": HELLO, "tool_choice": choice}
        error = client.post("/v1/chat/completions", json=body).json()["error"]
        assert error["param"] == "tool_choice"
