"""Requests against their JSON schemas: the same schemas that `/openapi.json` shows.

The subset of JSON schema that those use, with errors that name the field.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from offload_moe.serve.errors import invalid

logger = logging.getLogger(__name__)

Schema = Mapping[str, Any]
MOST_DEPTH = 64  # of a body
KINDS: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
BRACKETS = re.compile(rb"[\[\]{}]")
SURROGATE = re.compile(rb"\\u[dD]")
MOST_SHOWN = 60  # characters of a value in a message


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises: ApiError when it is none, too deep, or has numbers that JSON does not know."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        if _depth(body) > MOST_DEPTH:
            raise invalid(f"The body is nested more than {MOST_DEPTH} levels deep.")
        document = json.loads(body, parse_constant=refuse)
        if SURROGATE.search(body):
            json.dumps(document, ensure_ascii=False).encode()  # fails for half a character
    except (ValueError, RecursionError) as error:
        raise invalid(f"The body is no JSON: {error}.", code="invalid_json") from error
    if not isinstance(document, dict):
        raise invalid("The body is no JSON object.", code="invalid_json")
    return document


def _depth(body: bytes) -> int:
    """Of the JSON text: Python's own parser has no limit but the stack's."""
    depth = deepest = 0
    for token in BRACKETS.findall(STRING.sub(b"", body)):
        depth += 1 if token in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def check(document: Mapping[str, Any], schema: Schema) -> None:
    """Refuse a document that its schema does not fit, and log fields that the schema does not have.

    Raises: ApiError that names the first field at fault.
    """
    _check(document, schema, "")
    if unknown := sorted(document.keys() - schema["properties"].keys()):
        logger.info("Ignored: %r", ", ".join(unknown)[:500])


def _check(value: Any, schema: Schema, path: str) -> None:
    if "anyOf" in schema:
        _check_any(value, schema["anyOf"], path)
        return
    if "type" in schema and not _is_kind(value, schema["type"]):
        raise _wrong(value, schema, path)
    if "enum" in schema and value not in schema["enum"]:
        raise _wrong(value, schema, path)
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float) and not _is_in_range(value, schema):
        raise _wrong(value, schema, path)
    if isinstance(value, str) and not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1 << 40):
        raise _wrong(value, schema, path)
    if isinstance(value, list):
        _check_list(value, schema, path)
    if isinstance(value, dict):
        _check_object(value, schema, path)


def _check_list(value: list[Any], schema: Schema, path: str) -> None:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1 << 40):
        raise _wrong(value, schema, path)
    for index, item in enumerate(value):
        _check(item, schema.get("items", {}), f"{path}[{index}]")


def _check_object(value: dict[str, Any], schema: Schema, path: str) -> None:
    prefix = f"{path}." if path else ""
    for name in schema.get("required", ()):
        if name not in value:
            raise invalid(f"{prefix}{name} is missing.", prefix + name, "missing_required_parameter")
    properties = schema.get("properties", {})
    for name, item in value.items():
        if name in properties:
            _check(item, properties[name], prefix + name)
        elif isinstance(others := schema.get("additionalProperties"), dict):
            _check(item, others, prefix + name)


def _check_any(value: Any, schemas: Sequence[Schema], path: str) -> None:
    """The error of the alternative that is of the value's kind."""
    fitting = [each for each in schemas if "type" not in each or _is_kind(value, each["type"])]
    if not fitting:
        raise _wrong(value, {"anyOf": schemas}, path)
    for each in fitting[:-1]:
        try:
            _check(value, each, path)
        except Exception:
            continue
        return
    _check(value, fitting[-1], path)


def _is_kind(value: Any, kinds: str | Sequence[str]) -> bool:
    names = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(value, bool):
        return "boolean" in names
    if isinstance(value, float) and value.is_integer() and "integer" in names:
        return True
    return any(isinstance(value, KINDS[name]) for name in names)


def _is_in_range(value: float, schema: Schema) -> bool:
    low, high = schema.get("minimum"), schema.get("maximum")
    return (low is None or value >= low) and (high is None or value <= high)


def _wrong(value: Any, schema: Schema, path: str) -> Exception:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."
    return invalid(f"{path or 'The body'} is {shown}. It must be {describe(schema)}.", path or None, "invalid_value")


def describe(schema: Schema) -> str:
    """What a schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(describe(each) for each in schema["anyOf"]))
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(each) for each in schema["enum"])
    kinds = schema.get("type", "anything")
    words = " or ".join([kinds] if isinstance(kinds, str) else kinds)
    for word, names in (("from", ("minimum",)), ("to", ("maximum",))):
        words += "".join(f" {word} {schema[name]}" for name in names if name in schema)
    sizes = [("at least", "minItems"), ("at most", "maxItems")]
    words += "".join(f" of {word} {schema[name]} items" for word, name in sizes if name in schema)
    lengths = [("at least", "minLength"), ("at most", "maxLength")]
    return words + "".join(f" of {word} {schema[name]} characters" for word, name in lengths if name in schema)
