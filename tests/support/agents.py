"""Requests in the shape that coding agents send, with everything that they send beside the question."""

from typing import Any

SHELL = {
    "type": "object",
    "properties": {
        "cmd": {"type": "string", "description": "Shell command to execute."},
        "yield_time_ms": {"type": "number"},
    },
    "required": ["cmd"],
    "additionalProperties": False,
}
PATCH = 'start: "*** Begin Patch" LF "*** End Patch" LF?\n%import common.LF\n'


def codex(*more: dict[str, Any]) -> dict[str, Any]:
    """A request of Codex to `/v1/responses`; more: the items of later turns."""
    return {
        "model": "mixtral-store",
        "instructions": "You are Codex, a coding agent.",
        "input": [
            _said("developer", "<permissions instructions>Ask first.</permissions instructions>"),
            _said("user", "<environment_context><cwd>/src</cwd></environment_context>"),
            _said("user", "List the files."),
            *more,
        ],
        "tools": [
            {"type": "function", "name": "exec_command", "description": "Runs.", "strict": False, "parameters": SHELL},
            {
                "type": "custom",
                "name": "apply_patch",
                "description": "Edits files.",
                "format": {"type": "grammar", "syntax": "lark", "definition": PATCH},
            },
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "019a",
        "text": {"verbosity": "medium"},
        "client_metadata": {"x-codex-installation-id": "1"},
    }


def _said(role: str, text: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


def codex_turn(items: list[dict[str, Any]], output: str) -> list[dict[str, Any]]:
    """The items of an answer as Codex returns them, with the result of its call."""
    kept = [{name: value for name, value in item.items() if name not in ("id", "status")} for item in items]
    results = [
        {"type": f"{item['type']}_output", "call_id": item["call_id"], "output": output}
        for item in items
        if item["type"] in ("function_call", "custom_tool_call")
    ]
    reasoning = {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "gAAA"}
    return [reasoning, *kept, *results]


def claude_code(*more: dict[str, Any], session: str = "0a") -> dict[str, Any]:
    """A request of Claude Code to `/v1/messages`; more: the messages of later turns."""
    kept = {"type": "ephemeral"}
    return {
        "model": "mixtral-store",
        "max_tokens": 32000,
        "temperature": 1,
        "system": [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.39.{session}; cch={session};"},
            {"type": "text", "text": "You are Claude Code, a coding agent.", "cache_control": kept},
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>Be careful.</system-reminder>"},
                    {"type": "text", "text": "List the files.", "cache_control": kept},
                ],
            },
            *more,
        ],
        "tools": [
            {
                "name": "Bash",
                "description": "Runs a command.",
                "input_schema": {"$schema": "http://json-schema.org/draft-07/schema#", **SHELL},
                "eager_input_streaming": True,
            },
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        ],
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "metadata": {"user_id": "user_1_session_2"},
        "stream": True,
    }
