"""What the streams of OpenAI's chat and text completions share."""

import time
from typing import Any

from offload_moe.serve.collected import Collected
from offload_moe.serve.errors import ApiError
from offload_moe.serve.events import Event, Finished, Progress, Usage
from offload_moe.serve.wire import encode, sse


class ChunkWriter:
    """Chunks of one answer, and what was in them; see `Writer`."""

    def __init__(self, identity: str, kind: str, model: str, *, has_usage: bool) -> None:
        """kind: of the chunks. has_usage: a stream ends with the usage."""
        self._has_usage = has_usage
        self._created = int(time.time())
        self._collected = Collected()
        self._begun: set[int] = set()
        # A chunk around a text, as bytes: encoding it for every token would be the most of a token's cost here.
        self._head = encode({"id": identity, "object": kind, "created": self._created, "model": model})

    def write(self, event: Event) -> bytes:
        """Of events that both streams write alike."""
        match event:
            case Finished():
                usage = self._chunk([], usage=usage_json(event.usage), timings=event.usage.timings)
                return (usage if self._has_usage else b"") + b"data: [DONE]\n\n"
            case Progress():
                return self._chunk([], prompt_progress=progress_json(event))
        return b""

    def failed(self, error: ApiError) -> bytes:
        return sse(error.document("openai"))

    def silence(self) -> bytes:
        return b": waiting\n\n"

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        if self._has_usage:
            more = {"usage": None} | more
        return b"data: " + self._head[:-1] + b"," + encode({"choices": choices, **more})[1:] + b"\n\n"


def progress_json(event: Progress) -> dict[str, Any]:
    return {
        "total": event.num_prompt,
        "cache": event.num_cached,
        "processed": event.num_done,
        "time_ms": round(1e3 * event.elapsed_s),
    }


def usage_json(usage: Usage) -> dict[str, Any]:
    """As chat and text completions have it."""
    return {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": usage.num_generated,
        "total_tokens": usage.num_prompt + usage.num_generated,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.num_reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
