"""OpenAI's `/v1/completions`: text or token ids, continued without a template."""

import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from offload_moe.checkpoint.token_ids import check_ids
from offload_moe.errors import ConfigError
from offload_moe.serve.delivery import Delivery
from offload_moe.serve.errors import as_mapping, invalid
from offload_moe.serve.events import ChoiceEnd, Event, Logprob, TextDelta
from offload_moe.serve.guide import Grammar
from offload_moe.serve.host import Host, Loaded
from offload_moe.serve.jobs import Request
from offload_moe.serve.offers import grammar_of
from offload_moe.serve.openai_chunks import ChunkWriter, usage_json
from offload_moe.serve.prepare import check_length
from offload_moe.serve.prompts import Rendered
from offload_moe.serve.sampling import check_bias, settings_of
from offload_moe.serve.schemas import (
    BOOLEAN,
    MOST_TOKENS,
    OBJECT,
    SAMPLING,
    TEXT,
    array,
    either,
    integer,
    optional,
    record,
)
from offload_moe.serve.settings import Settings

MOST_LOGPROBS = 5
IDS = array(integer(0, MOST_TOKENS), least=1)
SCHEMA = record(
    {
        "model": TEXT,
        "prompt": either(TEXT, IDS, array(TEXT, least=1, most=1), array(IDS, least=1, most=1)),
        **SAMPLING,
        "max_tokens": optional(integer(1, MOST_TOKENS)),
        "logprobs": optional(integer(0, MOST_LOGPROBS)),
        "echo": optional(BOOLEAN),
        "suffix": optional(TEXT),
        "best_of": optional(integer(1, 1)),
        "response_format": optional(record({"type": TEXT}, "type")),
        "grammar": optional(TEXT),
        "json_schema": optional(OBJECT),
        "structured_outputs": optional(OBJECT),
    },
    "model",
    "prompt",
)
DEFAULT_TOKENS = 16  # OpenAI's


def completion_delivery(host: Host, document: Mapping[str, Any]) -> Delivery:
    """The answer to a checked request. Raises: ApiError."""
    if document.get("suffix"):
        raise invalid("suffix is not supported: these models continue a text, they fill no gap.", "suffix")
    identity = f"cmpl-{secrets.token_hex(12)}"
    settings = settings_of(
        document, max_tokens=document.get("max_tokens") or DEFAULT_TOKENS, top_logprobs=document.get("logprobs")
    )
    grammar = grammar_of(document)
    has_usage = bool(as_mapping(document.get("stream_options")).get("include_usage"))
    writer = partial(CompletionWriter, identity, host.name, has_usage=has_usage)
    return Delivery(
        host,
        lambda loaded: _prepare(loaded, identity, document, settings, grammar),
        lambda request: writer(echoed=request.rendered.text if document.get("echo") else ""),
        is_streamed=bool(document.get("stream")),
        shows_progress=bool(document.get("return_progress")),
    )


def _prepare(
    loaded: Loaded, identity: str, document: Mapping[str, Any], settings: Settings, grammar: Grammar | None
) -> Request:
    check_bias(settings, loaded.num_logits)
    with loaded.lock:
        rendered = _rendered(loaded, document["prompt"])
        guides = loaded.guides if grammar is not None else None
    check_length(loaded, len(rendered.ids), "prompt")
    if grammar is not None and guides is not None:
        guides.make(grammar)
    return Request(
        id=identity,
        prompts=loaded.raw,
        rendered=rendered,
        settings=settings,
        num_choices=int(document.get("n") or 1),
        grammar=grammar,
        guides=guides,
    )


def _rendered(loaded: Loaded, prompt: str | Sequence[Any]) -> Rendered:
    if not isinstance(prompt, str) and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    try:
        if isinstance(prompt, str):
            return Rendered(text=prompt, ids=loaded.raw.format.encode(prompt))
        ids = [int(token) for token in prompt]
        check_ids(ids, loaded.num_logits, loaded.tokenizer)
        return Rendered(text=loaded.tokenizer.decode(ids), ids=ids)
    except ConfigError as error:
        raise invalid(str(error), "prompt") from error


class CompletionWriter(ChunkWriter):
    """See `Writer`."""

    def __init__(self, identity: str, model: str, *, has_usage: bool, echoed: str = "") -> None:
        """has_usage: a stream ends with the usage. echoed: text before the first token of each choice."""
        super().__init__(identity, "text_completion", model, has_usage=has_usage)
        self._base = {"id": identity, "object": "text_completion", "created": self._created, "model": model}
        self._echoed = echoed
        self._lengths: dict[int, int] = {}  # of the text so far, by choice

    def write(self, event: Event) -> bytes:
        self._collected.add(event)
        match event:
            case TextDelta():
                begun = self._lengths.get(event.choice, 0)
                text = event.text if begun else self._echoed + event.text
                self._lengths[event.choice] = begun + len(text)
                shown = _logprobs(event.logprobs, begun or len(self._echoed))
                return self._chunk([_choice(event.choice, text, None, shown)])
            case ChoiceEnd():
                return self._chunk([_choice(event.choice, "", event.reason)])
        return super().write(event)

    def document(self) -> dict[str, Any]:
        collected = self._collected
        choices = [
            _choice(number, self._echoed + choice.text, choice.reason, _logprobs(choice.logprobs, len(self._echoed)))
            for number, choice in sorted(collected.choices.items())
        ]
        usage = usage_json(collected.usage)
        return self._base | {"choices": choices, "usage": usage, "timings": collected.usage.timings}


def _choice(index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(logprobs: Sequence[Logprob], begun: int) -> dict[str, Any] | None:
    """begun: characters of the text before them."""
    if not logprobs:
        return None
    lengths = [len(each.token) for each in logprobs]
    return {
        "tokens": [each.token for each in logprobs],
        "token_logprobs": [each.value for each in logprobs],
        "top_logprobs": [{top.token: top.value for top in each.top} for each in logprobs],
        "text_offset": [*accumulate(lengths[:-1], initial=begun)],
    }
