"""A call that must be made, as a grammar in the family's own format."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from offload_moe.serve.guide import JSON_STYLE, Grammar
from offload_moe.serve.tools.formats import HARMONY, CallFormat
from offload_moe.serve.tools.tool import Tool


def forced_grammar(call_format: CallFormat, tools: Sequence[Tool], special_ids: Mapping[str, int]) -> Grammar:
    """One call of one of these tools. special_ids: of the special tokens, which are no text to a grammar."""
    lines = ["start: " + " | ".join(f"call{number}" for number in range(len(tools)))]
    for number, tool in enumerate(tools):
        before, behind = (text.replace("NAME", tool.name) for text in call_format.forced)
        if call_format.arguments == "json":
            lines.append(f"call{number}: {_text(before, special_ids)} args{number} {_text(behind, special_ids)}")
            lines.append(f"args{number}: {_json(tool.schema)}")
        else:
            lines += _tagged(call_format, number, tool, (before, behind), special_ids)
    return Grammar(kind="lark", source="\n".join(lines) + "\n", param="tools", is_whole=call_format is HARMONY)


def _tagged(
    call_format: CallFormat, number: int, tool: Tool, around: tuple[str, str], special_ids: Mapping[str, int]
) -> list[str]:
    """Each parameter of the schema at most once, in its order; the required ones exactly once."""
    required = tool.schema.get("required", ())
    names, rules = [], []
    for at, (key, schema) in enumerate((tool.schema.get("properties") or {}).items()):
        rule = f"param{number}x{at}"
        before, behind = (text.replace("KEY", key) for text in call_format.parameter)
        names.append(rule if key in required else f"{rule}?")
        is_text = isinstance(schema, dict) and schema.get("type") == "string" and "enum" not in schema
        if is_text and call_format.arguments != "python":
            closing = behind.strip("\n")  # where the reader sees the end of a text
            after = _text(behind.rpartition(closing)[2], special_ids)
            rules.append(f"{rule}: {_text(before, special_ids)} value{number}x{at} {after}")
            rules.append(f"value{number}x{at}[suffix={json.dumps(closing)}]: /(?s:.*)/")
        else:
            value = f"{_text(before, special_ids)} value{number}x{at} {_text(behind, special_ids)}"
            rules += [f"{rule}: {value}", f"value{number}x{at}: {_json(schema)}"]
    before, behind = around
    parts = [_text(before, special_ids), *names, _text(behind, special_ids)]
    return [f"call{number}: {' '.join(parts)}", *rules]


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
