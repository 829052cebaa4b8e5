"""JSON schemas that several APIs share."""

from collections.abc import Mapping, Sequence
from typing import Any

Schema = dict[str, Any]

GREATEST_TEMPERATURE = 100
MOST_CHOICES = 16
MOST_TOP_LOGPROBS = 20
MOST_TOKENS = 2**31 - 1
GREATEST_SEED = 2**63 - 1
MOST_STOPS = 16
LONGEST_NAME = 128


def number(low: float | None = None, high: float | None = None) -> Schema:
    return _bounded("number", low, high)


def integer(low: int | None = None, high: int | None = None) -> Schema:
    return _bounded("integer", low, high)


def string(*choices: str, longest: int | None = None) -> Schema:
    schema: Schema = {"type": "string"}
    if choices:
        schema["enum"] = [*choices]
    if longest is not None:
        schema["maxLength"] = longest
    return schema


def array(items: Mapping[str, Any], *, least: int = 0, most: int | None = None) -> Schema:
    schema: Schema = {"type": "array", "items": dict(items)}
    if least:
        schema["minItems"] = least
    if most is not None:
        schema["maxItems"] = most
    return schema


def record(properties: Mapping[str, Any], *required: str) -> Schema:
    schema: Schema = {"type": "object", "properties": dict(properties)}
    if required:
        schema["required"] = [*required]
    return schema


def either(*schemas: Mapping[str, Any]) -> Schema:
    return {"anyOf": [dict(each) for each in schemas]}


def optional(schema: Mapping[str, Any]) -> Schema:
    """Or null, which means the default."""
    return either(schema, NULL)


def _bounded(kind: str, low: float | None, high: float | None) -> Schema:
    bounds = {"minimum": low, "maximum": high}
    return {"type": kind} | {name: value for name, value in bounds.items() if value is not None}


NULL: Schema = {"type": "null"}
OBJECT: Schema = {"type": "object"}
BOOLEAN: Schema = {"type": "boolean"}
TEXT: Schema = {"type": "string"}
STOP = optional(either(string(), array(string(), most=MOST_STOPS)))
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": LONGEST_NAME}
# Fields that every API takes in the same sense; the last ones are those of llama.cpp and vLLM.
CHOOSING: Schema = {
    "temperature": optional(number(0, GREATEST_TEMPERATURE)),
    "top_p": optional(number(0, 1)),
    "seed": optional(integer(0, GREATEST_SEED)),
    "frequency_penalty": optional(number(-2, 2)),
    "presence_penalty": optional(number(-2, 2)),
    "logit_bias": optional({"type": "object", "additionalProperties": number(-100, 100)}),
    "stream": optional(BOOLEAN),
    "user": optional(TEXT),
    "metadata": optional(OBJECT),
    "top_k": optional(integer(-1, MOST_TOKENS)),
    "min_p": optional(number(0, 1)),
    "repetition_penalty": optional(number(0.01, 100)),
    "ignore_eos": optional(BOOLEAN),
}
# And those that both of OpenAI's completions take.
SAMPLING: Schema = {
    **CHOOSING,
    "stop": STOP,
    "n": optional(integer(1, MOST_CHOICES)),
    "stream_options": optional(record({"include_usage": optional(BOOLEAN)})),
    "return_progress": optional(BOOLEAN),
}


def given(document: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those fields that are there and not null."""
    return {name: document[name] for name in names if document.get(name) is not None}
