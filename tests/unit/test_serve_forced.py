"""Calls that must be made: whatever a model draws under the grammar of a format is a call that its reader reads."""

import json
import random

import numpy as np
import pytest

from offload_moe.chat.reasoning import overlap
from offload_moe.serve.guide import Guides
from offload_moe.serve.tools.forced import forced_grammar
from offload_moe.serve.tools.formats import FORMATS, HARMONY, CallFormat
from offload_moe.serve.tools.tool import Tool
from tests.support.chat import END_OF_TEXT, VOCABULARY_SIZE, byte_tokenizer, ids_of
from tests.unit.test_serve_tools import read

PAINT = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 5},
            "unit": {"enum": ["c", "f"]},
            "is_long": {"type": "boolean"},
            "days": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
        },
        "required": ["city", "is_long"],
    },
)
OTHER = Tool(name="add")
MOST_TOKENS = 600


@pytest.fixture(scope="module")
def guides() -> Guides:
    return Guides(byte_tokenizer(), {END_OF_TEXT}, VOCABULARY_SIZE)


def drawn(guides: Guides, call_format: CallFormat, tools: list[Tool], seed: int) -> str:
    """A text drawn under the grammar; strings tend to end."""
    tokenizer, dice = byte_tokenizer(), random.Random(seed)
    matcher = guides.make(forced_grammar(call_format, tools, {})).matcher
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


@pytest.mark.parametrize("call_format", [each for each in FORMATS if each is not HARMONY], ids=lambda each: each.name)
@pytest.mark.parametrize("seed", range(8))
def test_a_forced_call_is_read(guides: Guides, call_format: CallFormat, seed: int) -> None:
    written = drawn(guides, call_format, [PAINT], seed)
    text, calls = read(call_format, [written])
    assert text == "", written
    [(name, arguments)] = calls
    given = json.loads(arguments)
    assert name == "get_weather"
    assert {"city", "is_long"} <= given.keys() <= set(PAINT.parameters["properties"]), written
    assert isinstance(given["is_long"], bool)
    assert isinstance(given["city"], str)
    assert given.get("unit", "c") in ("c", "f")


@pytest.mark.parametrize("call_format", [each for each in FORMATS if each is not HARMONY], ids=lambda each: each.name)
def test_one_of_several_tools(guides: Guides, call_format: CallFormat) -> None:
    found = {read(call_format, [drawn(guides, call_format, [PAINT, OTHER], seed)])[1][0][0] for seed in range(12)}
    assert found == {"get_weather", "add"}


def test_special_tokens_are_written_by_their_numbers(guides: Guides) -> None:
    grammar = forced_grammar(HARMONY, [OTHER], {"<|channel|>": 259, "<|message|>": 260})
    assert grammar.is_whole
    matcher = guides.make(grammar).matcher
    tokenizer = byte_tokenizer()
    assert matcher.consume_tokens([259, *ids_of(tokenizer, "commentary to=functions.add <|constrain|>json"), 260])
