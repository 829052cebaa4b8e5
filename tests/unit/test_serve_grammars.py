"""Calls that must be made: whatever a model draws under the grammar of a format is a call that its reader reads."""

import json
import random
from typing import Any

import numpy as np
import pytest

from offload_moe.chat.reasoning import overlap
from offload_moe.serve.guide import Grammar, Guides, json_grammar
from offload_moe.serve.tools.formats import FORMATS, HARMONY, CallFormat
from offload_moe.serve.tools.grammars import answer_or_call, arguments_grammar, forced_grammar
from offload_moe.serve.tools.tool import Tool
from tests.support.chat import END_OF_TEXT, VOCABULARY_SIZE, byte_tokenizer, ids_of
from tests.unit.test_serve_tools import read

PAINT = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 5},
            "unit": {"type": "string", "enum": ["c", "f"]},
            "wind": {"$ref": "#/$defs/Wind"},
            "is_long": {"type": "boolean"},
            "days": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
        },
        "required": ["city", "is_long"],
        "$defs": {"Wind": {"anyOf": [{"$ref": "#/$defs/Force"}, {"type": "null"}]}, "Force": {"enum": [3, 4]}},
    },
)
OTHER = Tool(name="add")
MOST_TOKENS = 600


@pytest.fixture(scope="module")
def guides() -> Guides:
    return Guides(byte_tokenizer(), {END_OF_TEXT}, VOCABULARY_SIZE)


def drawn(guides: Guides, call_format: CallFormat, grammar: Grammar, seed: int) -> str:
    """A text drawn under the grammar; strings tend to end."""
    tokenizer, dice = byte_tokenizer(), random.Random(seed)
    matcher = guides.make(grammar).matcher
    ids: list[int] = []
    last = call_format.parameter[1].strip("\n") if call_format.arguments not in ("json", "python") else '"'
    while not matcher.is_stopped() and len(ids) < MOST_TOKENS:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = [int(token) for token in bits[:END_OF_TEXT].nonzero()[0]]
        if not allowed:
            break
        [ending] = ids_of(tokenizer, last[overlap(tokenizer.decode(ids), last)])
        plain = [token for token in allowed if 33 < token < 60] or allowed
        token = ending if ending in allowed and dice.random() < 0.9 else dice.choice(plain)
        assert matcher.consume_token(token)
        ids.append(token)
    assert len(ids) < MOST_TOKENS
    return tokenizer.decode(ids)


FORCED = [each for each in FORMATS if each is not HARMONY]


@pytest.mark.parametrize("call_format", FORCED, ids=lambda each: each.name)
@pytest.mark.parametrize("seed", range(8))
def test_a_forced_call_is_read(guides: Guides, call_format: CallFormat, seed: int) -> None:
    check_call(call_format, drawn(guides, call_format, forced_grammar(call_format, [PAINT], {}), seed))


@pytest.mark.parametrize("call_format", FORCED, ids=lambda each: each.name)
@pytest.mark.parametrize("seed", range(8))
def test_arguments_behind_a_header_are_read(guides: Guides, call_format: CallFormat, seed: int) -> None:
    written = drawn(guides, call_format, arguments_grammar(call_format, PAINT, {}), seed)
    before, behind = call_format.forced
    is_json = call_format.arguments == "json"
    check_call(call_format, before.strip().replace("NAME", PAINT.name) + written + (behind if is_json else ""))


def check_call(call_format: CallFormat, written: str) -> None:
    text, calls = read(call_format, [written])
    assert text == "", written
    [(name, arguments)] = calls
    given = json.loads(arguments)
    assert name == "get_weather"
    assert {"city", "is_long"} <= given.keys() <= set(PAINT.parameters["properties"]), written
    assert isinstance(given["is_long"], bool)
    assert isinstance(given["city"], str)
    assert len(given["city"]) <= 5
    assert given.get("unit", "c") in ("c", "f")
    assert given.get("wind") in (None, 3, 4)


@pytest.mark.parametrize("call_format", FORCED, ids=lambda each: each.name)
def test_one_of_several_tools(guides: Guides, call_format: CallFormat) -> None:
    grammar = forced_grammar(call_format, [PAINT, OTHER], {})
    found = {read(call_format, [drawn(guides, call_format, grammar, seed)])[1][0][0] for seed in range(12)}
    assert found == {"get_weather", "add"}


@pytest.mark.parametrize("call_format", FORCED, ids=lambda each: each.name)
def test_an_answer_or_a_call(guides: Guides, call_format: CallFormat) -> None:
    answer = json_grammar({"enum": [{"is_done": True}, {"is_done": False}]})
    grammar = answer_or_call(answer, call_format, [OTHER], {})
    call = drawn(guides, call_format, forced_grammar(call_format, [OTHER], {}), 0)
    for text, is_right in (
        ('{"is_done": true}', True),
        (call, True),
        ('{"is_done": 1}', False),
        ("So. " + call, False),
    ):
        assert is_whole(guides, grammar, text) == is_right, text


def is_whole(guides: Guides, grammar: Grammar, text: str) -> bool:
    """Whether nothing is missing in a text, and nothing is wrong."""
    matcher, tokens = guides.make(grammar).matcher, guides.tokenizer.tokenize_str(text)
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


TEXTS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"minLength": 2, "maxLength": 3}, ["ab", "abc", "äö"], ["a", "abcd", ""]),
    ({"minLength": 2}, ["ab", "a, b < c"], ["a", "\n"]),
    ({"maxLength": 3}, ["", "a<b", "a"], ["abcd"]),
    ({"minLength": 2, "maxLength": 2}, ["ab"], ["a", "abc"]),
    ({"maxLength": 0}, [""], ["a"]),
    ({"pattern": "^[a-c]+/[0-9]$"}, ["ab/7"], ["ab7", "ab/7 "]),
    ({"pattern": "b{2}"}, ["abbc", "bb"], ["abc"]),
    ({"pattern": r"^cost: \$"}, ["cost: $", "cost: $5"], ["cost: ", "5"]),
    ({"pattern": r"^C:\\$"}, ["C:\\"], ["C:", "C:\\x"]),
    ({"enum": ["red", "green"]}, ["red", "green"], ["blue", '"red"']),
    ({"const": "only"}, ["only"], ["other"]),
    ({"maxLength": 10**9, "minLength": "x"}, ["", "any <b>text</b>\nof lines"], []),
]


@pytest.mark.parametrize(("schema", "right", "wrong"), TEXTS)
@pytest.mark.parametrize("name", ["qwen3 coder", "glm", "minimax"])
def test_texts_in_tags_follow_their_schemas(
    guides: Guides, name: str, schema: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    call_format = next(each for each in FORMATS if each.name == name)
    properties = {"key": {"type": "string"} | schema}
    grammar = arguments_grammar(
        call_format, Tool(name="set", parameters={"properties": properties, "required": ["key"]}), {}
    )
    before, behind = call_format.parameter
    for text in (*right, *wrong):
        written = f"{before}{text}{behind}".replace("KEY", "key") + call_format.forced[1]
        assert is_whole(guides, grammar, written) == (text in right), text


def test_special_tokens_are_written_by_their_numbers(guides: Guides) -> None:
    grammar = forced_grammar(HARMONY, [OTHER], {"<|channel|>": 259, "<|message|>": 260})
    assert grammar.is_whole
    matcher = guides.make(grammar).matcher
    tokenizer = byte_tokenizer()
    assert matcher.consume_tokens([259, *ids_of(tokenizer, "commentary to=functions.add <|constrain|>json"), 260])
