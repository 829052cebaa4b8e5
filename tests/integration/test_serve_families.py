"""Reasoning and calls as families write them: templates that open the tag, special tokens, and harmony's channels."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tokenizers import AddedToken

from offload_moe.engine.model import Model
from offload_moe.serve.tools.formats import FORMATS, CallFormat
from tests.support.chat import CHATML, Scripted
from tests.support.serving import HELLO, chat, events, served

THINKING = CHATML + "{# <think></think> #}"
OPENED = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
HARMONY = (
    TOOLS + "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|> #}"
)
PAINT = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {"type": "object", "properties": {"colour": {"enum": ["red"]}}, "required": ["colour"]},
    },
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "green"]}}}


@pytest.fixture
def speaking(model: Model) -> Iterator[Callable[..., Any]]:
    """A client of a model with this template that says these tokens."""
    template, scripts = model.tokenizer.chat_template, list[Scripted]()

    @contextmanager
    def make(new_template: str, said: str) -> Iterator[TestClient]:
        model.tokenizer.chat_template = new_template
        ids = model.tokenizer(said + "<|endoftext|>", add_special_tokens=False)["input_ids"]
        scripts.append(Scripted(model.hf, ids))
        with served(model) as client:
            yield client

    yield make
    model.tokenizer.chat_template = template
    for script in scripts:
        script.remove()


@pytest.mark.parametrize(
    ("template", "said"),
    [(THINKING, "<think>\nHm, 1+1.\n</think>\n\nIt is 2."), (OPENED, "Hm, 1+1.\n</think>\n\nIt is 2.")],
    ids=["the model opens it", "the prompt opens it"],
)
def test_reasoning_is_told_from_the_answer(speaking: Any, template: str, said: str) -> None:
    with speaking(template, said) as client:
        answer = chat(client, max_tokens=100)
        message = answer["choices"][0]["message"]
        assert (message["reasoning_content"].strip(), message["content"]) == ("Hm, 1+1.", "It is 2.")
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 5
        assert client.get("/props").json()["has_reasoning"]


def test_reasoning_streams_in_every_api(speaking: Any) -> None:
    with speaking(OPENED, "Hm.</think>Two.") as client:
        body = {"model": "x", "messages": HELLO, "stream": True, "max_tokens": 100, "temperature": 0}
        deltas = [
            part["choices"][0]["delta"] for part in events(client.post("/v1/chat/completions", json=body).text)[:-1]
        ]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
        assert "".join(delta.get("content", "") for delta in deltas) == "Two."
    with speaking(OPENED, "Hm.</think>Two.") as client:
        blocks = client.post("/v1/messages", json=body | {"stream": False}).json()["content"]
        assert [(block["type"], block.get("thinking") or block.get("text")) for block in blocks] == [
            ("thinking", "Hm."),
            ("text", "Two."),
        ]
    with speaking(OPENED, "Hm.</think>Two.") as client:
        kinds = [event["type"] for event in events(client.post("/v1/messages", json=body).text)]
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    with speaking(OPENED, "Hm.</think>Two.") as client:
        response = client.post("/v1/responses", json={"model": "x", "input": "Hi", "temperature": 0}).json()
        assert [item["type"] for item in response["output"]] == ["reasoning", "message"]


def test_a_schema_holds_behind_the_reasoning(speaking: Any) -> None:
    for template, said in ((THINKING, "<think>free words</think>blue"), (OPENED, "free words</think>blue")):
        with speaking(template, said) as client:
            message = chat(client, max_tokens=100, response_format=SCHEMA)["choices"][0]["message"]
            assert message["reasoning_content"] == "free words"
            assert json.loads(message["content"]) in ("red", "green")


def test_a_schema_holds_without_reasoning_too(speaking: Any) -> None:
    with speaking(THINKING, "blue") as client:
        message = chat(client, max_tokens=100, response_format=SCHEMA)["choices"][0]["message"]
        assert json.loads(message["content"]) in ("red", "green")


def test_calls_of_harmony(speaking: Any) -> None:
    said = (
        "<|channel|>analysis<|message|>I shall paint.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.paint json"
        '<|message|>{"colour": "red"}'
    )
    with speaking(HARMONY, said) as client:
        answer = chat(client, max_tokens=300, tools=[PAINT])["choices"][0]
        message = answer["message"]
        [call] = message["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("paint", {"colour": "red"})
        assert (message["reasoning_content"], message["content"]) == ("I shall paint.", None)
        assert answer["finish_reason"] == "tool_calls"


def strict(tool: Any) -> Any:
    return {"type": "function", "function": tool["function"] | {"strict": True}}


@pytest.mark.parametrize("call_format", FORMATS, ids=lambda each: each.name)
@pytest.mark.parametrize("stop", [None, ["{never", "<never", "(never"]], ids=["", "texts are held back"])
def test_arguments_of_strict_tools_follow_their_schema(speaking: Any, call_format: CallFormat, stop: Any) -> None:
    """The model begins a call and then says something else; where no tool is strict, that is what comes out."""
    comment = "{# " + " ".join(call_format.marks) + " #}"
    template = HARMONY if call_format.name == "harmony" else TOOLS + CHATML + comment
    said = call_format.forced[0].replace("NAME", "paint") + "blue"
    for tools, is_right in (([strict(PAINT)], True), ([PAINT], False)):
        with speaking(template, said) as client:
            message = chat(client, max_tokens=300, tools=tools, stop=stop)["choices"][0]["message"]
            found = [call["function"] for call in message.get("tool_calls", ())]
            assert (found == [{"name": "paint", "arguments": '{"colour": "red"}'}]) == is_right, message


@pytest.mark.parametrize("call_format", [each for each in FORMATS if each.special], ids=lambda each: each.name)
def test_special_tokens_of_calls(model: Model, speaking: Any, call_format: CallFormat) -> None:
    """Where the tags are special tokens, as most families have them: calls that are required, strict, and free."""
    plain = model.tokenizer
    model.tokenizer = copy.deepcopy(plain)
    model.tokenizer.add_tokens([AddedToken(token, special=True) for token in call_format.special])
    template = TOOLS + CHATML + "{# " + " ".join(call_format.marks) + " #}"
    before, behind = (text.replace("NAME", "paint") for text in call_format.forced)
    key, value_end = (text.replace("KEY", "colour") for text in call_format.parameter)
    value = (
        '{"colour": "red"}'
        if call_format.arguments == "json"
        else '"red"'
        if "python" in call_format.arguments
        else "red"
    )
    whole = before + key + value + value_end + behind
    try:
        for said, fields in (
            (whole, {"tools": [PAINT]}),
            (before + "blue", {"tools": [strict(PAINT)]}),
            ("blue", {"tools": [PAINT], "tool_choice": "required"}),
            (whole, {"tools": [PAINT], "response_format": SCHEMA}),
        ):
            with speaking(template, said) as client:
                message = chat(client, max_tokens=300, **fields)["choices"][0]["message"]
                [call] = message["tool_calls"]
                assert json.loads(call["function"]["arguments"]) == {"colour": "red"}, (said, message)
                assert not (message["content"] or "").startswith("<")
    finally:
        model.tokenizer = plain


def test_two_calls_of_harmony_to_the_same_tool(speaking: Any) -> None:
    call = '<|channel|>commentary to=functions.paint json<|message|>{"colour": "red"}<|end|>'
    with speaking(HARMONY, f"{call}<|start|>assistant{call}") as client:
        answer = chat(client, max_tokens=300, tools=[PAINT])
        calls = answer["choices"][0]["message"]["tool_calls"]
        assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"colour": "red"}] * 2
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_harmony_without_a_known_recipient_is_reasoning(speaking: Any) -> None:
    said = "<|channel|>commentary to=browser.open<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>Done."
    with speaking(HARMONY, said) as client:
        message = chat(client, max_tokens=300, tools=[PAINT])["choices"][0]["message"]
        assert (message["content"], "tool_calls" in message) == ("Done.", False)


def test_special_tokens_of_a_format_are_read(model: Model, speaking: Any) -> None:
    model.tokenizer.add_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    with speaking(TOOLS + CHATML + "{# [TOOL_CALLS] #}", '[TOOL_CALLS] [{"name": "paint", "arguments": {}}]') as client:
        [call] = chat(client, max_tokens=300, tools=[PAINT])["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "paint"


RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<call:(?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}


def test_a_tokenizers_own_parser_is_used_where_the_format_is_unknown(
    model: Model, speaking: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model.tokenizer.response_template = RESPONSE_TEMPLATE
    try:
        for said, text, calls in (
            ('So. <call:paint>{"colour": "red"}</call>', "So. ", [{"colour": "red"}]),
            ('<call:launch>{"a": 1}</call>', '{"a": 1}', []),
            ("<call:paint>no JSON</call> Done.", "no JSON Done.", []),
            ("<call:paint>", None, []),
        ):
            with speaking(TOOLS + CHATML, said) as client:
                message = chat(client, max_tokens=300, tools=[PAINT])["choices"][0]["message"]
                found = [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls", ())]
                assert (message["content"] or None, found) == (text, calls), said
        with speaking(TOOLS + CHATML, "x") as client:
            chat(client, tools=[strict(PAINT)])
            assert "not held to their schemas" in caplog.text
            body = {"model": "x", "messages": HELLO, "tools": [PAINT], "tool_choice": "required"}
            assert client.post("/v1/chat/completions", json=body).json()["error"]["param"] == "tool_choice"
    finally:
        model.tokenizer.response_template = None


def test_the_template_is_given_tools_and_arguments(speaking: Any, tmp_path: Path) -> None:
    template = TOOLS + "{{ enable_thinking }}{{ reasoning_effort }}{{ mood }}" + CHATML + "{# <tool_call> #}"
    with speaking(template, "x") as client:
        more = {"tools": [PAINT], "reasoning_effort": "none", "chat_template_kwargs": {"mood": "calm"}}
        assert chat(client, **more)["usage"]["prompt_tokens"] > chat(client)["usage"]["prompt_tokens"] + 50
        tokens = client.post("/tokenize", json={"messages": HELLO, "tools": [PAINT]}).json()["tokens"]
        assert '"name": "paint"' in client.post("/detokenize", json={"tokens": tokens}).json()["content"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
        "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    ],
    ids=["no system role", "strict turns"],
)
def test_messages_that_a_template_refuses_are_put_where_it_takes_them(speaking: Any, template: str) -> None:
    with speaking(template, "x") as client:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One"},
            {"role": "user", "content": "Two"},
        ]
        tokens = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
        text = client.post("/detokenize", json={"tokens": tokens}).json()["content"]
        assert [text.count(part) for part in ("Be brief.", "One", "Two")] == [1, 1, 1]
