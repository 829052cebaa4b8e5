"""The clients that people have, against a real socket: OpenAI's and Anthropic's packages, LiteLLM, and llm."""

import asyncio
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from offload_moe.engine.model import Model
from tests.support.chat import Scripted, ids_of
from tests.support.clients import run_client
from tests.support.serving import HELLO, listening

KEY = "sesame"
CALL = '<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call>'
COLOUR = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "paint", "parameters": COLOUR}}
LIMITS: dict[str, Any] = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def url(model: Model) -> Iterator[str]:
    with listening(model, api_key=KEY, parallel=2) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture
def calling(model: Model) -> Iterator[Scripted]:
    """The model calls a tool, once."""
    script = Scripted(model.hf, [*ids_of(model.tokenizer, "So. " + CALL), 256])
    yield script
    script.remove()


@pytest.fixture
def openai_client(url: str) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def anthropic_client(url: str) -> Iterator[Any]:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def paint_model() -> Any:
    """A schema as a class."""
    pydantic = pytest.importorskip("pydantic")

    class Paint(pydantic.BaseModel):
        is_warm: bool
        level: int = pydantic.Field(ge=0, le=9)

    return Paint


class TestOpenai:
    def test_an_answer_and_its_stream(self, openai_client: Any) -> None:
        answer = openai_client.chat.completions.create(
            model="x", messages=HELLO, logprobs=True, top_logprobs=2, **LIMITS
        )
        chunks = list(
            openai_client.chat.completions.create(
                model="x", messages=HELLO, stream=True, stream_options={"include_usage": True}, **LIMITS
            )
        )
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == answer.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens == 12
        assert len(answer.choices[0].logprobs.content) == 12

    def test_asynchronously(self, url: str) -> None:
        openai = pytest.importorskip("openai")

        async def ask() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
                asked = [client.chat.completions.create(model="x", messages=HELLO, seed=1, **LIMITS) for _ in range(3)]
                answers = await asyncio.gather(*asked)
                stream = await client.chat.completions.create(model="x", messages=HELLO, stream=True, **LIMITS)
                said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
                return [*(answer.choices[0].message.content for answer in answers), said]

        assert len(set(asyncio.run(ask()))) == 1

    def test_a_schema_of_pydantic(self, openai_client: Any) -> None:
        paint = paint_model()
        answer = openai_client.chat.completions.parse(
            model="x", messages=HELLO, response_format=paint, max_tokens=60, temperature=0
        )
        assert isinstance(answer.choices[0].message.parsed, paint)
        response = openai_client.responses.parse(
            model="x", input="Hello!", text_format=paint, max_output_tokens=60, temperature=0
        )
        assert isinstance(response.output_parsed, paint)

    def test_tools(self, openai_client: Any, calling: Scripted) -> None:
        with openai_client.chat.completions.stream(model="x", messages=HELLO, tools=[TOOL], max_tokens=300) as stream:
            answer = stream.get_final_completion()
        [call] = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("paint", {"colour": "red"})
        assert answer.choices[0].finish_reason == "tool_calls"
        messages = [
            *HELLO,
            answer.choices[0].message.to_dict(),
            {"role": "tool", "tool_call_id": call.id, "content": "ok"},
        ]
        again = openai_client.chat.completions.create(model="x", messages=messages, tools=[TOOL], max_tokens=5)
        assert again.choices[0].finish_reason == "stop"

    def test_responses(self, openai_client: Any) -> None:
        answer = openai_client.responses.create(model="x", input="Hello!", max_output_tokens=12, temperature=0)
        assert answer.incomplete_details.reason == "max_output_tokens"
        with openai_client.responses.stream(model="x", input="Hello!", max_output_tokens=16, temperature=0) as stream:
            kinds = [event.type for event in stream]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.incomplete"
        assert kinds.count("response.output_text.delta") > 3

    def test_responses_call_tools(self, openai_client: Any, calling: Scripted) -> None:
        tools = [{"type": "function", "name": "paint", "parameters": COLOUR, "strict": False}, {"type": "web_search"}]
        items: list[Any] = [{"role": "user", "content": "Paint!"}]
        answer = openai_client.responses.create(model="x", input=items, tools=tools)
        said, call = answer.output
        assert said.content[0].text.strip() == "So."
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "paint", {"colour": "red"})
        items += [each.to_dict() for each in answer.output]
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "painted"})
        assert openai_client.responses.create(model="x", input=items, tools=tools).status == "completed"
        calling.num_calls = 0
        with openai_client.responses.stream(model="x", input="Paint!", tools=tools) as stream:
            deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        assert json.loads("".join(deltas)) == {"colour": "red"}

    def test_custom_tools_of_responses(self, openai_client: Any) -> None:
        tools = [{"type": "custom", "name": "apply_patch", "description": "Applies a patch."}]
        choice = {"type": "custom", "name": "apply_patch"}
        answer = openai_client.responses.create(
            model="x", input="Patch!", tools=tools, tool_choice=choice, max_output_tokens=200, temperature=0
        )
        [call] = answer.output
        assert (call.type, call.name) == ("custom_tool_call", "apply_patch")

    def test_completions_and_models(self, openai_client: Any) -> None:
        assert openai_client.completions.create(model="x", prompt="Once", **LIMITS).choices[0].finish_reason == "length"
        assert [model.id for model in openai_client.models.list()] == ["tiny"]
        assert openai_client.models.retrieve("tiny").id == "tiny"

    def test_errors_are_of_its_own_kinds(self, openai_client: Any, url: str) -> None:
        openai = pytest.importorskip("openai")
        long = [{"role": "user", "content": "x" * 5000}]
        with pytest.raises(openai.BadRequestError) as caught:
            openai_client.chat.completions.create(model="x", messages=long)
        assert caught.value.code == "context_length_exceeded"
        stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()


class TestAnthropic:
    def test_an_answer_and_its_stream(self, anthropic_client: Any) -> None:
        asked: dict[str, Any] = {"model": "x", "messages": HELLO, "system": "Be brief.", "max_tokens": 12}
        answer = anthropic_client.messages.create(**asked)
        assert answer.stop_reason == "max_tokens"
        with anthropic_client.messages.stream(**asked) as stream:
            said = "".join(stream.text_stream)
            last = stream.get_final_message()
        assert said == answer.content[0].text == last.content[0].text
        used = answer.usage
        assert used.input_tokens + used.cache_read_input_tokens == (
            last.usage.input_tokens + last.usage.cache_read_input_tokens
        )
        assert last.usage.output_tokens == 12

    def test_tools(self, anthropic_client: Any, calling: Scripted) -> None:
        tools: Any = [
            {"name": "paint", "input_schema": COLOUR},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 2},
        ]
        with anthropic_client.messages.stream(model="x", messages=HELLO, tools=tools, max_tokens=300) as stream:
            answer = stream.get_final_message()
        text, call = answer.content
        assert text.text.strip() == "So."
        assert (call.type, call.name, call.input) == ("tool_use", "paint", {"colour": "red"})
        assert answer.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "painted"}]}
        messages = [*HELLO, {"role": "assistant", "content": [block.to_dict() for block in answer.content]}]
        messages.append({"role": "user", "content": [result, {"type": "text", "text": "Good."}]})
        again = anthropic_client.messages.create(model="x", messages=messages, tools=tools, max_tokens=300)
        counted = anthropic_client.messages.count_tokens(model="x", messages=messages, tools=tools).input_tokens
        assert again.usage.input_tokens + again.usage.cache_read_input_tokens == counted

    def test_asynchronously(self, url: str) -> None:
        anthropic = pytest.importorskip("anthropic")
        asked: dict[str, Any] = {"model": "x", "messages": HELLO, "max_tokens": 12}

        async def ask() -> list[str]:
            async with anthropic.AsyncAnthropic(base_url=url, api_key=KEY) as client:
                answers = await asyncio.gather(*(client.messages.create(**asked) for _ in range(3)))
                async with client.messages.stream(**asked) as stream:
                    said = "".join([text async for text in stream.text_stream])
                return [*(answer.content[0].text for answer in answers), said]

        assert len(set(asyncio.run(ask()))) == 1

    def test_a_schema_of_pydantic(self, anthropic_client: Any) -> None:
        answer = anthropic_client.messages.parse(model="x", messages=HELLO, max_tokens=60, output_format=paint_model())
        assert 0 <= answer.parsed_output.level <= 9

    @pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "paint"}])
    def test_a_call_may_be_required(self, anthropic_client: Any, choice: Any) -> None:
        tools: Any = [{"name": "paint", "input_schema": COLOUR}]
        answer = anthropic_client.messages.create(
            model="x", messages=HELLO, tools=tools, tool_choice=choice, max_tokens=200
        )
        [call] = answer.content
        assert (answer.stop_reason, call.name) == ("tool_use", "paint")
        assert call.input["colour"] in ("red", "green")

    def test_calls_may_be_off(self, anthropic_client: Any, calling: Scripted) -> None:
        tools: Any = [{"name": "paint", "input_schema": COLOUR}]
        asked: dict[str, Any] = {"model": "x", "messages": HELLO, "tools": tools, "max_tokens": 300}
        answer = anthropic_client.messages.create(tool_choice={"type": "none"}, **asked)
        assert (answer.stop_reason, answer.content[0].text) == ("end_turn", "So. " + CALL)
        calling.tokens = [*calling.tokens[:-1], *calling.tokens[3:]]
        calling.num_calls = 0
        one = {"type": "auto", "disable_parallel_tool_use": True}
        assert [block.type for block in anthropic_client.messages.create(tool_choice=one, **asked).content] == [
            "text",
            "tool_use",
        ]

    def test_stop_sequences(self, anthropic_client: Any, calling: Scripted) -> None:
        answer = anthropic_client.messages.create(model="x", messages=HELLO, max_tokens=50, stop_sequences=["."])
        assert (answer.stop_reason, answer.stop_sequence, answer.content[0].text) == ("stop_sequence", ".", "So")

    def test_models(self, anthropic_client: Any) -> None:
        [listed] = anthropic_client.models.list()
        assert (listed.id, listed.display_name, listed.created_at.year > 2024) == ("tiny", "tiny", True)
        assert anthropic_client.models.retrieve("tiny").type == "model"

    def test_errors_are_of_its_own_kinds(self, anthropic_client: Any) -> None:
        anthropic = pytest.importorskip("anthropic")
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 50"):
            anthropic_client.messages.create(
                model="x", max_tokens=1, messages=[{"role": "user", "content": "x" * 5000}]
            )


LITELLM = """
import asyncio, json, sys
import litellm

url, key, tool, schema = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
hello = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 12, "temperature": 0}
openai = {"model": "openai/x", "api_base": url + "/v1", "api_key": key}
anthropic = {"model": "anthropic/x", "api_base": url, "api_key": key}


def text(answer):
    return answer.choices[0].message.content


def streamed(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


found = {
    "answers": [
        text(litellm.completion(**openai, **hello)),
        streamed(litellm.completion(**openai, **hello, stream=True)),
        text(asyncio.run(litellm.acompletion(**openai, **hello))),
        text(litellm.completion(**anthropic, **hello)),
        streamed(litellm.completion(**anthropic, **hello, stream=True)),
    ]
}
asked = hello | {"max_tokens": 200}
called = litellm.completion(**openai, **asked, tools=[tool], tool_choice="required")
[call] = called.choices[0].message.tool_calls
found["call"] = [call.function.name, json.loads(call.function.arguments)]
wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
found["schema"] = json.loads(text(litellm.completion(**openai, **asked, response_format=wanted)))
for each in (openai, anthropic):
    try:
        litellm.completion(**each, messages=[{"role": "user", "content": "x" * 5000}], max_tokens=5)
    except litellm.ContextWindowExceededError as error:
        found.setdefault("errors", []).append(error.status_code)
print(json.dumps(found))
"""


def test_litellm(url: str, tmp_path: Path) -> None:
    """Through both APIs, whole and in parts; with tools and a schema; and its own error for prompts that do not fit."""
    if find_spec("litellm") is None:
        pytest.skip("no litellm")
    command = [sys.executable, "-c", LITELLM, url, KEY, json.dumps(TOOL), json.dumps(COLOUR)]
    found = json.loads(run_client(command, tmp_path).stdout.splitlines()[-1])
    assert len(set(found["answers"])) == 1
    assert len(found["answers"][0]) > 5
    assert found["call"][0] == "paint"
    assert found["call"][1]["colour"] in ("red", "green")
    assert found["schema"]["colour"] in ("red", "green")
    assert found["errors"] == [400, 400]


def test_llm_calls_a_function(url: str, calling: Scripted, tmp_path: Path) -> None:
    """Then it sends the result, and the model has nothing to add."""
    if find_spec("llm") is None:
        pytest.skip("no llm")
    names = "- model_id: tiny\n  model_name: tiny\n  api_key_name: tiny\n"
    settings = f"{names}  api_base: {url}/v1\n  supports_tools: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(settings)
    function = "def paint(colour: str) -> str:\n    return 'painted ' + colour"
    command = [sys.executable, "-m", "llm", "-m", "tiny", "--functions", function, "--td", "--key", KEY, "Paint!"]
    done = run_client(command, tmp_path, LLM_USER_PATH=str(tmp_path))
    assert done.stdout.startswith("So.")
    assert "painted red" in done.stderr
