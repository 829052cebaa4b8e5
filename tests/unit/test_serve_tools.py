"""Calls in the formats of the families, cut at every place, and what only looks like a call."""

import json
from itertools import groupby
from typing import Any

import pytest

from offload_moe.serve.events import TextDelta, ToolDelta, ToolStart
from offload_moe.serve.tools.arguments import PythonArguments, TaggedArguments
from offload_moe.serve.tools.formats import FORMATS, HERMES, CallFormat, format_of, knows_tools
from offload_moe.serve.tools.parameters import choices, kinds, names, parameter, resolved, value_of
from offload_moe.serve.tools.parser import CallParser
from offload_moe.serve.tools.tool import Tool

WEATHER = Tool(
    name="get_weather",
    parameters={"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
)
ADD = Tool(
    name="add", parameters={"type": "object", "properties": {"a": {"type": "number"}, "zip": {"type": "string"}}}
)
TOOLS = {tool.name: tool for tool in (WEATHER, ADD)}
CITY = {"city": 'Paris "X" }', "days": 2}
SUM = {"a": 1, "zip": "0123"}


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


TWO_CALLS = {
    "hermes": f'<tool_call>\n{{"name": "get_weather", "arguments": {compact(CITY)}}}\n</tool_call>\n'
    f'<tool_call>{{"name": "add", "parameters": {compact(SUM)}}}</tool_call>',
    "mistral": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {compact(CITY)}}}, '
    f'{{"name": "add", "arguments": {compact(SUM)}, "id": "abc123def"}}]',
    "mistral with names": f"[TOOL_CALLS]get_weather[ARGS]{compact(CITY)}[TOOL_CALLS]add[CALL_ID]a1[ARGS]{compact(SUM)}",
    "deepseek v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    f"{compact(CITY)}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>add<｜tool▁sep｜>{compact(SUM)}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "kimi k2": f"<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    f"{compact(CITY)}<|tool_call_end|><|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>{compact(SUM)}"
    "<|tool_call_end|><|tool_calls_section_end|>",
    "qwen3 coder": f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{CITY['city']}\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=zip>\n0123\n</parameter>\n</function>\n</tool_call>",
    "glm": f"<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{CITY['city']}</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n"
    "<tool_call>add\n<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>zip</arg_key><arg_value>0123</arg_value></tool_call>",
    "minimax": f'<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">{CITY["city"]}</parameter>\n'
    '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="add">\n<parameter name="a">1</parameter>\n'
    '<parameter name="zip">0123</parameter>\n</invoke>\n</minimax:tool_call>',
    "llama 4": f"<|python_start|>[get_weather(city={CITY['city']!r}, days=2), add(a=1, zip='0123')]",
}
BY_NAME = {each.name: each for each in FORMATS}


def read(call_format: CallFormat, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and names with arguments."""
    parser = CallParser(call_format, TOOLS)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.flush()
    text, calls, ids = "", [], set()
    for event in events:
        match event:
            case TextDelta(text=more):
                text += more
            case ToolStart(tool=number, name=name, id=identity):
                assert number == len(calls)
                calls.append((name, ""))
                ids.add(identity)
            case ToolDelta(tool=number, text=more):
                assert number == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + more)
    assert len(ids) == len(calls) == parser.num_calls
    return text, calls


def cuts(text: str) -> list[list[str]]:
    halves = [[text[:at], text[at:]] for at in range(0, len(text), 3)]
    return [[text], list(text), *halves]


def test_every_format_of_the_table_is_tried() -> None:
    assert {*TWO_CALLS, "harmony"} == set(BY_NAME)


@pytest.mark.parametrize("name", TWO_CALLS)
def test_two_calls_behind_a_text(name: str) -> None:
    for pieces in cuts("Let me see. " + TWO_CALLS[name]):
        text, calls = read(BY_NAME[name], pieces)
        assert text == "Let me see. ", pieces
        assert [call for call, _ in calls] == ["get_weather", "add"]
        assert [json.loads(arguments) for _, arguments in calls] == [CITY, SUM]


@pytest.mark.parametrize("name", TWO_CALLS)
def test_a_tool_that_was_not_offered_comes_back_as_text(name: str) -> None:
    written = TWO_CALLS[name].replace("get_weather", "launch").replace("add", "other")
    for pieces in cuts(written):
        text, calls = read(BY_NAME[name], pieces)
        assert calls == []
        assert text == written


@pytest.mark.parametrize(
    "text",
    [
        "no call at all, though 1 < 2",
        "<tool_call> is how it is written",
        '<tool_call>{"name": "get_weather"}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": "text"}</tool_call>',
        "<tool_call>",
        "<tool_ca",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    for pieces in cuts(text):
        assert read(HERMES, pieces) == (text, [])


def test_a_call_that_is_cut_off_keeps_what_there_is() -> None:
    _, calls = read(HERMES, ['<tool_call>{"name": "add", "arguments": {"a": 1'])
    assert calls == [("add", '{"a": 1')]
    _, calls = read(BY_NAME["glm"], ["<tool_call>add\n<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>z"])
    assert calls == [("add", '{"a": 1}')]


ENDINGS = {
    "hermes": '<tool_call>{"name": "add", "arguments": {"a": 1}}\n</tool',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}',
    "deepseek v3": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}'
    "<｜tool▁call▁end｜><｜tool▁calls",
    "qwen3 coder": "<tool_call><function=add><parameter=a>1</parameter></function>\n</tool",
    "minimax": '<minimax:tool_call><invoke name="add"><parameter name="a">1</parameter></invoke>\n</mini',
}


@pytest.mark.parametrize("name", ENDINGS)
def test_the_ending_of_a_call_that_is_cut_off_is_no_text(name: str) -> None:
    written = ENDINGS[name]
    first = written.index("1") + 5
    for end in range(first, len(written) + 1):
        text, [(called, arguments)] = read(BY_NAME[name], [written[:end]])
        assert (text, called) == ("", "add")
        assert json.loads(arguments) in ({"a": 1}, {})  # a parameter may be cut off, too


def test_arguments_stream_as_they_come() -> None:
    parser = CallParser(HERMES, TOOLS)
    parser.push('<tool_call>{"name": "add", "arguments": {"a": ')
    assert [event.text for event in parser.push("12") if isinstance(event, ToolDelta)] == ["12"]


@pytest.mark.parametrize("name", ["qwen3 coder", "glm", "minimax"])
def test_a_long_text_is_looked_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent writes whole files: the work for a token does not grow with what stands before it."""
    long = "".join(f"line {number} </param> <\n" for number in range(2000))
    written = TWO_CALLS[name].replace(str(CITY["city"]), long)
    parser, num_read = CallParser(BY_NAME[name], TOOLS), 0
    read_once = TaggedArguments.read

    def count(reader: TaggedArguments) -> str:
        nonlocal num_read
        num_read += len(reader.unread)
        return read_once(reader)

    monkeypatch.setattr(TaggedArguments, "read", count)
    events = [event for at in range(0, len(written), 7) for event in parser.push(written[at : at + 7])]
    arguments = "".join(event.text for event in events if isinstance(event, ToolDelta) and event.tool == 0)
    assert json.loads(arguments)["city"].strip() == long.strip()
    assert num_read < 3 * len(written)


def test_text_behind_a_call_is_kept() -> None:
    for pieces in cuts(TWO_CALLS["hermes"] + "\nDone."):
        text, calls = read(HERMES, pieces)
        assert len(calls) == 2
        assert text.strip() == "Done."


def test_formats_are_known_by_their_templates() -> None:
    assert not knows_tools(None)
    assert not knows_tools("{{ messages }}")
    assert knows_tools("{% if tools %}")
    found = {each.name: format_of("{% if tools %}" + each.marks[0]) for each in FORMATS}
    assert {name: each.name for name, each in found.items() if each is not None} == {name: name for name in found}
    assert format_of("{% if tools %} something else") is None


@pytest.mark.parametrize("num_ahead", [0, 3])
@pytest.mark.parametrize("name", TWO_CALLS)
def test_the_tool_that_is_called_is_known_before_its_arguments(name: str, num_ahead: int) -> None:
    """From the header's end to that of the arguments, without a gap, also where text is held back elsewhere."""
    written = TWO_CALLS[name]
    parser = CallParser(BY_NAME[name], TOOLS)
    found: list[tuple[str, str] | None] = []
    for end in range(1, len(written) + 1):
        parser.push(written[end - num_ahead - 1 : end - num_ahead] if end > num_ahead else "")
        found.append(parser.called(written[max(0, end - num_ahead) : end]))
    runs = [[each for each in run if each] for called, run in groupby(found, lambda each: each and each[0]) if called]
    assert [run[0][0] for run in runs] == ["get_weather", "add"]
    for run in runs:
        texts = [*dict.fromkeys(text for _, text in run)]  # a header may end with a blank or without
        assert texts[0] == ""
        assert texts == [texts[-1][:length] for length in range(len(texts))]
        assert len(texts[-1]) > 4


def test_a_name_that_may_go_on_is_not_called_yet() -> None:
    parser = CallParser(BY_NAME["glm"], {"get": WEATHER, "get_weather": WEATHER})
    parser.push("<tool_call>get")
    assert parser.called() is None
    parser.push("_weather\n")
    assert parser.called() == ("get_weather", "")
    assert parser.called("<arg") == ("get_weather", "<arg")
    assert parser.called("Rome") is None


ROOT: dict[str, Any] = {
    "properties": {
        "text": {"type": "string"},
        "either": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "list": {"type": ["string", "integer"]},
        "colour": {"$ref": "#/$defs/Colour"},
        "number": {"type": "number"},
        "size": {"enum": [1, "big"]},
        "fixed": {"const": "7"},
        "open": {},
        "mixed": {"anyOf": [{"type": "string"}, {}]},
        "lost": {"$ref": "#/$defs/Absent"},
        "loop": {"$ref": "#/$defs/Loop"},
        "anything": True,
    },
    "$defs": {"Colour": {"type": "string", "enum": ["red", "1"]}, "Loop": {"$ref": "#/$defs/Loop"}},
}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("text", "12", "12"),
        ("text", "null", "null"),
        ("either", "12", "12"),
        ("either", "null", None),
        ("either", '"12"', "12"),
        ("either", "plain", "plain"),
        ("list", "12", 12),
        ("list", "1.5", "1.5"),
        ("list", "true", "true"),
        ("colour", "1", "1"),
        ("number", "3", 3),
        ("number", "three", "three"),
        ("size", "1", 1),
        ("size", "big", "big"),
        ("fixed", "7", "7"),
        ("open", "[1]", [1]),
        ("open", "NaN", "NaN"),
        ("mixed", "[1]", [1]),
        ("lost", "1", 1),
        ("loop", "1", 1),
        ("anything", "1", 1),
        ("unknown", "1", 1),
    ],
)
def test_a_parameters_text_is_read_by_its_schema(name: str, text: str, value: object) -> None:
    read = value_of(text, parameter(ROOT, name))
    assert (read, type(read)) == (value, type(value))


def test_what_a_schema_says_of_a_parameter() -> None:
    assert names(ROOT)[:2] == ["text", "either"]
    assert names({"properties": None}) == []
    assert kinds(parameter(ROOT, "colour")) == {"string"}
    assert choices(parameter(ROOT, "colour")) == ["red", "1"]
    assert choices(parameter(ROOT, "fixed")) == ["7"]
    assert kinds(parameter(ROOT, "mixed")) == kinds(parameter(ROOT, "lost")) == frozenset()
    assert resolved(parameter(ROOT, "loop")) == {}


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("city='Rome', days=2)", {"city": "Rome", "days": 2}),
        ("'Rome', days=2)", {"city": "Rome", "days": 2}),
        ("'Rome', 2)", {"city": "Rome", "days": 2}),
        ("true, null)", {"city": True, "days": None}),
        ("1, 2, 3)", {"text": "1, 2, 3"}),
        ("city={1, 2})", {"text": "city={1, 2}"}),
        ("city=1e999)", {"text": "city=1e999"}),
        ("city=b'x')", {"text": "city=b'x'"}),
        ("city=open('x'))", {"text": "city=open('x')"}),
        (")", {}),
    ],
)
def test_arguments_of_python(written: str, arguments: object) -> None:
    reader = PythonArguments(WEATHER.parameters)
    assert json.loads(reader.push(written)) == arguments
    assert (reader.is_over, reader.rest) == (True, "")
