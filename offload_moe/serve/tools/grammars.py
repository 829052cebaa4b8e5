"""Calls as grammars in the family's own format.

special_ids: the special tokens by their texts; a grammar has them by their numbers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from offload_moe.serve.guide import JSON_STYLE, Grammar
from offload_moe.serve.tools.formats import HARMONY, CallFormat
from offload_moe.serve.tools.parameters import choices, kinds, names, parameter, resolved
from offload_moe.serve.tools.tool import Tool

LONGEST = 1000  # characters of a limit in tags


def forced_grammar(call_format: CallFormat, tools: Sequence[Tool], special_ids: Mapping[str, int]) -> Grammar:
    """One call of one of these tools."""
    start, rules = _calls(call_format, tools, special_ids)
    return replace(_grammar([f"start: {start}", *rules]), is_whole=call_format is HARMONY)


def answer_or_call(
    answer: Grammar, call_format: CallFormat, tools: Sequence[Tool], special_ids: Mapping[str, int]
) -> Grammar:
    """An answer that follows a schema, or one call."""
    start, rules = _calls(call_format, tools, special_ids)
    return _grammar([f"start: answer | {start}", f"answer: {_json(json.loads(answer.source))}", *rules])


def arguments_grammar(call_format: CallFormat, tool: Tool, special_ids: Mapping[str, int]) -> Grammar:
    """What stands behind a call's header; a blank may come first."""
    arguments, rules = _arguments(call_format, 0, tool, special_ids)
    behind = "" if call_format.arguments == "json" else _text(call_format.forced[1], special_ids)
    return _grammar([f"start: blank? {arguments} {behind}", r"blank: /[ \n]/", *rules])


def _grammar(lines: Sequence[str]) -> Grammar:
    return Grammar(kind="lark", source="\n".join(lines) + "\n", param="tools")


def _calls(call_format: CallFormat, tools: Sequence[Tool], special_ids: Mapping[str, int]) -> tuple[str, list[str]]:
    """The alternatives, and their rules."""
    lines: list[str] = []
    for number, tool in enumerate(tools):
        before, behind = (_text(text.replace("NAME", tool.name), special_ids) for text in call_format.forced)
        arguments, rules = _arguments(call_format, number, tool, special_ids)
        lines += [f"call{number}: {before} {arguments} {behind}", *rules]
    return " | ".join(f"call{number}" for number in range(len(tools))), lines


def _arguments(
    call_format: CallFormat, number: int, tool: Tool, special_ids: Mapping[str, int]
) -> tuple[str, list[str]]:
    """Between a call's header and its end. Parameters in tags: each at most once, in the schema's order."""
    if call_format.arguments == "json":
        return f"args{number}", [f"args{number}: {_json(tool.schema)}"]
    listed = tool.schema.get("required")
    required = listed if isinstance(listed, list) else []
    parts, rules = [], []
    for at, key in enumerate(names(tool.schema)):
        rule = f"param{number}x{at}"
        parts.append(rule if key in required else f"{rule}?")
        rules += _parameter(call_format, rule, key, parameter(tool.schema, key), special_ids)
    return " ".join(parts), rules


def _parameter(
    call_format: CallFormat, rule: str, key: str, schema: Mapping[str, Any], special_ids: Mapping[str, int]
) -> list[str]:
    before, behind = (text.replace("KEY", key) for text in call_format.parameter)
    is_text = call_format.arguments != "python" and kinds(schema) == {"string"}
    if is_text and not choices(schema):
        closing = behind.strip("\n")  # where the reader sees the end of a text
        after = _text(behind.rpartition(closing)[2], special_ids)
        pattern = text_pattern(resolved(schema)) + (r"\n?" if behind.startswith("\n") else "")
        value = f"{rule}value[suffix={json.dumps(closing)}]: /{pattern}/"
        return [f"{rule}: {_text(before, special_ids)} {rule}value {after}", value]
    value = " | ".join(map(json.dumps, choices(schema))) if is_text else _json(schema)
    return [
        f"{rule}: {_text(before, special_ids)} {rule}value {_text(behind, special_ids)}",
        f"{rule}value: {value}",
    ]


def text_pattern(schema: Mapping[str, Any]) -> str:
    """A regular expression of the texts that a schema allows.

    Where a text must not end yet, it has no `<`, which its closing tag begins with.
    """
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        before = "" if pattern.startswith("^") else "[^<]*"
        num_escapes = len(pattern[:-1]) - len(pattern[:-1].rstrip("\\"))
        is_anchored = pattern.endswith("$") and num_escapes % 2 == 0
        inner = pattern.removeprefix("^").removesuffix("$" if is_anchored else "").replace("/", r"\/")
        return f"{before}({inner})" + ("" if is_anchored else "[^<]*")
    least, most = (_length(schema.get(name)) for name in ("minLength", "maxLength"))
    last = r"[^\n]"  # a line's end may stand before the tag
    if not least:
        return "(?s:.*)" if most is None else f"(?s:(.{{0,{most - 1}}}{last})?)" if most else ""
    if most is not None and most <= least:
        return rf"[^<]{{{least - 1}}}[^<\n]"
    more = "" if most is None else most - least - 1
    return rf"(?s:[^<]{{{least - 1}}}([^<\n]|[^<].{{0,{more}}}{last}))"


def _length(value: Any) -> int | None:
    is_usable = isinstance(value, int | float) and 0 <= value <= LONGEST
    return int(value) if is_usable else None


def _json(schema: Any) -> str:
    styled = {**schema, "x-guidance": JSON_STYLE} if isinstance(schema, dict) else schema
    return "%json " + json.dumps(styled)


def _text(text: str, special_ids: Mapping[str, int]) -> str:
    """A literal, with special tokens by their numbers."""
    for name, number in special_ids.items():
        before, found, behind = text.partition(name)
        if found:
            parts = (_text(before, special_ids), f"<[{number}]>", _text(behind, special_ids))
            return " ".join(part for part in parts if part)
    return json.dumps(text) if text else ""
