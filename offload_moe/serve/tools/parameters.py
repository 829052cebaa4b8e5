"""What a tool's schema says of one parameter, for formats that write texts without JSON's quotes."""

import json
from collections.abc import Mapping
from typing import Any

DEFINITIONS = ("$defs", "definitions")
MOST_REFERENCES = 16  # to references
KINDS: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}

Schema = Mapping[str, Any]


def names(root: Schema) -> list[str]:
    """The parameters of a tool, in the order of its schema."""
    return [*_properties(root)]


def parameter(root: Schema, name: str) -> Schema:
    """The schema of one parameter, with the definitions that it may refer to; empty where it is open."""
    schema = _properties(root).get(name)
    return {**_definitions(root), **schema} if isinstance(schema, dict) else {}


def resolved(schema: Schema) -> Schema:
    """What a schema refers to, where it is a reference."""
    for _ in range(MOST_REFERENCES):
        target = schema.get("$ref")
        if not isinstance(target, str):
            return schema
        found: Any = schema
        for step in target.removeprefix("#").split("/")[1:]:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            break
        schema = {**_definitions(schema), **found}
    return {}


def kinds(schema: Schema) -> frozenset[str]:
    """The JSON types that a value may have; empty where any may come."""
    schema = resolved(schema)
    if values := choices(schema):
        return frozenset(KINDS[type(value)] for value in values)
    kind = schema.get("type")
    if isinstance(kind, str | list):
        return frozenset([kind] if isinstance(kind, str) else kind)
    parts = schema.get("anyOf") or schema.get("oneOf") or ()
    found = [kinds({**_definitions(schema), **part}) for part in parts if isinstance(part, dict)]
    return frozenset().union(*found) if found and all(found) else frozenset()


def choices(schema: Schema) -> list[Any]:
    """The only values that may come; empty where there are others."""
    schema = resolved(schema)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else []


def value_of(text: str, schema: Schema) -> Any:
    """A parameter's text as its schema has it: a string stays one, whatever it looks like."""
    possible = kinds(schema)
    if possible == {"string"}:
        return text
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    kind = KINDS[type(value)]
    fits = kind in possible or (kind == "integer" and "number" in possible)
    return text if "string" in possible and not fits else value


def _properties(root: Schema) -> dict[str, Any]:
    properties = root.get("properties")
    return properties if isinstance(properties, dict) else {}


def _definitions(root: Schema) -> dict[str, Any]:
    return {name: root[name] for name in DEFINITIONS if name in root}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
