"""The tools and the structured output of a request, as every OpenAI API writes them."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from offload_moe.serve.errors import as_mapping, invalid
from offload_moe.serve.guide import ANY_OBJECT, Grammar, json_grammar
from offload_moe.serve.tools.tool import Tool, ToolUse, custom_tool

logger = logging.getLogger(__name__)

OWN_KINDS = ("function", "custom")  # of tools that the client runs itself


def tool_use(tools: Sequence[Mapping[str, Any]] | None, choice: Any, *, is_parallel: bool = True) -> ToolUse:
    """The tools of a request, nested (chat) or flat (responses). Hosted ones are dropped with a notice.

    Raises: ApiError.
    """
    offered = [tool for at, each in enumerate(tools or ()) if (tool := _tool(each, f"tools[{at}]")) is not None]
    names = [tool.name for tool in offered]
    if choice == "none":
        return ToolUse(tools=tuple(offered), is_off=True)
    forced: tuple[str, ...] = ()
    if choice in ("required", "any") or as_mapping(choice).get("type") in ("required", "any", "allowed_tools"):
        forced = _allowed(as_mapping(choice), names)
    elif isinstance(choice, dict) and not _is_hosted(choice, tools or ()):
        name = _name_of(choice)
        if name not in names:
            raise invalid(f"tool_choice names {str(name)[:60]!r}, which is not among the tools.", "tool_choice")
        forced = (str(name),)
    if choice in ("required", "any") and not offered:
        raise invalid("tool_choice requires a call, and there is no tool to call.", "tool_choice")
    return ToolUse(tools=tuple(offered), forced=forced, is_parallel=is_parallel)


def _name_of(tool: Mapping[str, Any]) -> Any:
    """Of a tool, or of a choice of one, nested or flat."""
    return as_mapping(tool.get(str(tool.get("type")))).get("name") or tool.get("name")


def _is_hosted(choice: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a choice is a hosted tool, by its type or by its name: it is dropped as the tool is."""
    hosted = [tool for tool in tools if tool.get("type", "function") not in OWN_KINDS]
    known = [each for tool in hosted for each in (tool.get("type"), _name_of(tool)) if isinstance(each, str)]
    is_hosted = choice.get("type") in known or _name_of(choice) in known
    if is_hosted:
        logger.warning("tool_choice is a hosted tool, which is not here; the request goes on without it")
    return is_hosted


def _allowed(choice: Mapping[str, Any], names: list[str]) -> tuple[str, ...]:
    if choice.get("type") != "allowed_tools":
        return tuple(names)
    allowed = as_mapping(choice.get("allowed_tools")) or choice
    listed = allowed.get("tools")
    chosen = [_name_of(as_mapping(tool)) for tool in (listed if isinstance(listed, list) else ())]
    return tuple(name for name in names if name in chosen) if allowed.get("mode") == "required" else ()


def _tool(tool: Mapping[str, Any], path: str) -> Tool | None:
    kind = tool.get("type", "function")
    inner = as_mapping(tool.get(str(kind))) or tool
    name = inner.get("name")
    if kind not in OWN_KINDS:
        logger.warning("The hosted tool %r is not here; the request goes on without it", str(kind)[:60])
        return None
    if not isinstance(name, str) or not name:
        raise invalid(f"{path}.{kind}.name is missing.", f"{path}.{kind}.name")
    description = inner.get("description") or ""
    if kind == "custom":
        return custom_tool(name, str(description))
    parameters = inner.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise invalid(f"{path}.function.parameters is no JSON schema.", f"{path}.function.parameters")
    return Tool(
        name=name, description=str(description), parameters=parameters or {}, is_strict=bool(inner.get("strict"))
    )


def grammar_of(document: Mapping[str, Any]) -> Grammar | None:
    """Structured output of a chat or a completion: OpenAI's field, or llama.cpp's and vLLM's. Raises: ApiError."""
    answer_format = document.get("response_format") or {}
    kind = answer_format.get("type", "text")
    if kind == "json_object":
        return Grammar(kind="json", source=json.dumps(answer_format.get("schema") or json.loads(ANY_OBJECT)))
    if kind == "json_schema":
        return schema_grammar(as_mapping(answer_format.get("json_schema")), "response_format.json_schema")
    if kind != "text":
        raise invalid(
            f"response_format.type is {str(kind)[:60]!r}. It must be text, json_object or json_schema.",
            "response_format.type",
        )
    return _own_grammar(document)


def schema_grammar(named: Mapping[str, Any], path: str) -> Grammar:
    """Of `{"name", "schema", "strict"}`. Raises: ApiError."""
    schema = named.get("schema")
    if not isinstance(schema, dict):
        raise invalid(f"{path}.schema is missing, or no JSON schema.", f"{path}.schema")
    return json_grammar(schema, f"{path}.schema")


def _own_grammar(document: Mapping[str, Any]) -> Grammar | None:
    if document.get("grammar"):
        return Grammar(kind="any", source=document["grammar"], param="grammar")
    if document.get("json_schema"):
        return json_grammar(document["json_schema"], "json_schema")
    asked = document.get("structured_outputs") or {}
    param = "structured_outputs"
    if isinstance(asked.get("json"), dict):
        return json_grammar(asked["json"], param)
    if isinstance(asked.get("choice"), list):
        return choice_grammar([str(each) for each in asked["choice"]], param)
    if isinstance(asked.get("regex"), str):
        return Grammar(kind="regex", source=asked["regex"], param=param)
    if isinstance(asked.get("grammar"), str):
        return Grammar(kind="any", source=asked["grammar"], param=param)
    return None


def choice_grammar(choices: Sequence[str], param: str) -> Grammar:
    """One of these texts."""
    return Grammar(kind="lark", source="start: " + " | ".join(json.dumps(each) for each in choices), param=param)
