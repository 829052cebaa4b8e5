"""A response's items and events as `/v1/responses` has them."""

import copy
import secrets
import time
from collections.abc import Sequence
from typing import Any

from offload_moe.serve.collected import custom_input
from offload_moe.serve.errors import ApiError
from offload_moe.serve.events import (
    ChoiceEnd,
    Event,
    Finished,
    Logprob,
    Reason,
    Started,
    TextDelta,
    ToolDelta,
    ToolStart,
    Usage,
)
from offload_moe.serve.tools.tool import Tool
from offload_moe.serve.wire import sse


class ResponseWriter:
    """See `Writer`. One item at a time is open: reasoning, a message, or a call."""

    def __init__(self, echo: dict[str, Any], tools: Sequence[Tool] = ()) -> None:
        """echo: the response before its output."""
        self._response = echo
        self._custom = {tool.name for tool in tools if tool.is_custom}
        self._number = 0
        self._item: dict[str, Any] | None = None
        self._reason: Reason = "stop"

    def write(self, event: Event) -> bytes:
        match event:
            case Started():
                return self._state("response.created") + self._state("response.in_progress")
            case TextDelta():
                return self._text(event)
            case ToolStart():
                return self._call(event)
            case ToolDelta():
                return self._arguments(event.text)
            case ChoiceEnd():
                self._reason = event.reason
                return self._close()
            case Finished():
                return self._finish(event.usage)
        return b""

    def failed(self, error: ApiError) -> bytes:
        shown = {"code": error.code or "server_error", "message": error.message}
        self._response |= {"status": "failed", "error": shown}
        problem = self._event("error", **shown, param=error.param, error=error.document("openai")["error"])
        return problem + self._state("response.failed")

    def silence(self) -> bytes:
        """Comments are not enough for Codex, which counts events alone."""
        return self._state("response.in_progress") if self._number else b": waiting\n\n"

    def document(self) -> dict[str, Any]:
        return self._response

    def _text(self, event: TextDelta) -> bytes:
        kind = "reasoning" if event.is_reasoning else "message"
        opened = b"" if self._item is not None and self._item["type"] == kind else self._open_text(kind)
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += event.text
        if event.is_reasoning:
            return opened + self._part_event("response.reasoning_text.delta", delta=event.text)
        logprobs = [_logprob(each) for each in event.logprobs]
        part["logprobs"] += logprobs
        return opened + self._part_event("response.output_text.delta", delta=event.text, logprobs=logprobs)

    def _open_text(self, kind: str) -> bytes:
        if kind == "reasoning":
            item: dict[str, Any] = {"type": "reasoning", "id": _identity("rs"), "summary": [], "content": []}
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item = {
                "type": "message",
                "id": _identity("msg"),
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        opened = self._open(item)
        item["content"] = [part]
        return opened + self._part_event("response.content_part.added", part=part)

    def _call(self, event: ToolStart) -> bytes:
        is_custom = event.name in self._custom
        kind, text = ("custom_tool_call", "input") if is_custom else ("function_call", "arguments")
        self._written = ""
        item = {"type": kind, "id": _identity("ctc" if is_custom else "fc"), "call_id": event.id, "name": event.name}
        return self._open(item | {text: "", "status": "in_progress"})

    def _arguments(self, text: str) -> bytes:
        item = self._item
        assert item is not None
        self._written += text
        if item["type"] == "function_call":
            item["arguments"] += text
            return self._item_event("response.function_call_arguments.delta", delta=text)
        return b""  # a custom tool's text is given out once it is whole

    def _open(self, item: dict[str, Any]) -> bytes:
        closed = self._close()
        self._item = item
        self._response["output"].append(item)
        return closed + self._event("response.output_item.added", output_index=self._index, item=item)

    def _close(self) -> bytes:
        """End the item in progress."""
        item = self._item
        if item is None:
            return b""
        if item["type"] != "reasoning":
            item["status"] = "completed"
        done = self._done(item) + self._event("response.output_item.done", output_index=self._index, item=item)
        self._item = None
        return done

    def _done(self, item: dict[str, Any]) -> bytes:
        match item["type"]:
            case "function_call":
                return self._item_event(
                    "response.function_call_arguments.done", arguments=item["arguments"], name=item["name"]
                )
            case "custom_tool_call":
                item["input"] = custom_input(self._written)
                delta = self._item_event("response.custom_tool_call_input.delta", delta=item["input"])
                return delta + self._item_event("response.custom_tool_call_input.done", input=item["input"])
        part = item["content"][0]
        if item["type"] == "reasoning":
            text = self._part_event("response.reasoning_text.done", text=part["text"])
        else:
            text = self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        return text + self._part_event("response.content_part.done", part=part)

    def _finish(self, usage: Usage) -> bytes:
        opened = b"" if self._response["output"] else self._open_text("message") + self._close()
        self._response |= {"usage": _usage(usage), "completed_at": int(time.time()), "status": "completed"}
        if self._reason == "length":
            self._response |= {
                "status": "incomplete",
                "completed_at": None,
                "incomplete_details": {"reason": "max_output_tokens"},
            }
            last = self._response["output"][-1]
            if "status" in last:
                last["status"] = "incomplete"
            return opened + self._state("response.incomplete")
        return opened + self._state("response.completed")

    @property
    def _index(self) -> int:
        return len(self._response["output"]) - 1

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=self._index, **fields)

    def _state(self, kind: str) -> bytes:
        return self._event(kind, response=copy.copy(self._response))

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = sse({"type": kind, "sequence_number": self._number, **fields}, kind)
        self._number += 1
        return event


def _identity(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _logprob(entry: Logprob) -> dict[str, Any]:
    shown = {"token": entry.token, "logprob": entry.value, "bytes": entry.bytes}
    return shown | {
        "top_logprobs": [{"token": top.token, "logprob": top.value, "bytes": top.bytes} for top in entry.top]
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached},
        "output_tokens": usage.num_generated,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning},
        "total_tokens": usage.num_prompt + usage.num_generated,
    }
