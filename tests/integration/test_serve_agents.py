"""What coding agents send over several turns: calls, their results, and prompts that are not computed twice."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from offload_moe.engine.model import Model
from tests.support.agents import claude_code, codex, codex_turn
from tests.support.serving import events, served

LINE = r"x-anthropic-billing-header: [^\n]*\n"


@pytest.fixture
def client(model: Model) -> Iterator[TestClient]:
    """Each test begins without kept caches."""
    with served(model, ignore_prefix=LINE) as client:
        yield client


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def ask_codex(client: TestClient, *more: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/v1/responses", json=codex(*more))
    assert response.status_code == 200, response.text
    last = events(response.text)[-1]
    assert last["type"] == "response.completed", last
    return last["response"]


def test_turns_of_codex(client: TestClient, say: Any) -> None:
    say("I shall look. " + call("exec_command", cmd="ls"))
    first = ask_codex(client)
    said, called = first["output"]
    assert (said["type"], called["type"], called["name"]) == ("message", "function_call", "exec_command")
    assert json.loads(called["arguments"]) == {"cmd": "ls"}
    items = codex_turn(first["output"], "a.py\nb.py")
    say(call("apply_patch", input="*** Begin Patch\n*** End Patch"))
    second = ask_codex(client, *items)
    [patch] = second["output"]
    assert (patch["type"], patch["input"]) == ("custom_tool_call", "*** Begin Patch\n*** End Patch")
    kept = second["usage"]["input_tokens_details"]["cached_tokens"]
    assert kept >= first["usage"]["input_tokens"] - 1
    say("Done.")
    third = ask_codex(client, *items, *codex_turn(second["output"], "Success."))
    assert third["output"][0]["content"][0]["text"] == "Done."
    assert third["usage"]["input_tokens_details"]["cached_tokens"] > kept


def ask_claude_code(client: TestClient, *more: dict[str, Any], **fields: Any) -> tuple[list[Any], dict[str, Any]]:
    """The blocks of an answer, and its usage."""
    response = client.post("/v1/messages?beta=true", json=claude_code(*more, **fields), headers={"anthropic-beta": "x"})
    assert response.status_code == 200, response.text
    found = events(response.text)
    assert [event["type"] for event in found if event["type"].startswith("message")] == [
        *("message_start", "message_delta", "message_stop")
    ]
    blocks = [event["content_block"] for event in found if event["type"] == "content_block_start"]
    for event in found:
        if event["type"] == "content_block_delta":
            block, delta = blocks[event["index"]], event["delta"]
            if delta["type"] == "text_delta":
                block["text"] += delta["text"]
            elif delta["type"] == "input_json_delta":
                block["written"] = block.get("written", "") + delta["partial_json"]
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("written"))
    return blocks, found[0]["message"]["usage"]


def test_turns_of_claude_code(client: TestClient, say: Any) -> None:
    say("I shall look. " + call("Bash", cmd="ls"))
    blocks, usage = ask_claude_code(client, session="0a")
    assert [block["type"] for block in blocks] == ["text", "tool_use"]
    assert (blocks[1]["name"], blocks[1]["input"]) == ("Bash", {"cmd": "ls"})
    assert usage["cache_read_input_tokens"] == 0
    result = {"type": "tool_result", "tool_use_id": blocks[1]["id"], "content": "a.py\nb.py", "is_error": False}
    turn = [{"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
    say("Two files.")
    again, used = ask_claude_code(client, *turn, session="1b")  # whose first line differs
    assert again == [{"type": "text", "text": "Two files."}]
    assert used["cache_read_input_tokens"] >= usage["input_tokens"] - 1
    asked = {name: value for name, value in claude_code(*turn).items() if name not in ("max_tokens", "stream")}
    counted = client.post("/v1/messages/count_tokens?beta=true", json=asked).json()["input_tokens"]
    assert counted == used["input_tokens"] + used["cache_read_input_tokens"]


def test_a_search_of_claude_code_is_answered_without_one(client: TestClient, say: Any) -> None:
    """It sends a request of its own for each search, with the hosted tool as the only one, and required."""
    say("I cannot search.")
    body = claude_code() | {
        "tools": [{"type": "web_search_20250305", "name": "web_search"}],
        "tool_choice": {"type": "tool", "name": "web_search"},
        "stream": False,
    }
    answer = client.post("/v1/messages", json=body).json()
    assert (answer["content"][0]["text"], answer["stop_reason"]) == ("I cannot search.", "end_turn")


def test_the_probe_of_claude_code(client: TestClient) -> None:
    assert client.head("/").status_code == 200
