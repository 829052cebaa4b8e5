"""The endpoints that compute nothing: state, models, texts as tokens."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from anyio import to_thread

import offload_moe
from offload_moe.errors import ConfigError
from offload_moe.serve.errors import ApiError, invalid
from offload_moe.serve.host import Host, Loaded
from offload_moe.serve.openai_chat import MESSAGE, conversation_of
from offload_moe.serve.schemas import BOOLEAN, MOST_TOKENS, OBJECT, TEXT, array, integer, optional, record

TOKENIZE = record(
    {
        "content": TEXT,
        "messages": array(MESSAGE, least=1),
        "tools": optional(array(OBJECT)),
        "add_special": optional(BOOLEAN),
        "model": optional(TEXT),
    }
)
DETOKENIZE = record({"tokens": array(integer(0, MOST_TOKENS)), "model": optional(TEXT)}, "tokens")


def models(host: Host) -> dict[str, Any]:
    page = {"has_more": False, "first_id": host.name, "last_id": host.name}
    return {"object": "list", "data": [model(host)], **page}


def model(host: Host) -> dict[str, Any]:
    """With the fields of both APIs."""
    loaded = host.loaded
    created_at = int(host.created_at)
    return {
        "id": host.name,
        "object": "model",
        "type": "model",
        "display_name": host.name,
        "created": created_at,
        "created_at": datetime.fromtimestamp(created_at, UTC).isoformat(),
        "owned_by": "offload-moe",
        "max_model_len": loaded.context if loaded is not None else None,
    }


def health(host: Host) -> dict[str, Any]:
    return {"status": host.state, "model": host.name}


def props(host: Host) -> dict[str, Any]:
    """See docs/serve.md, "The page's data"."""
    loaded = host.loaded
    config = host.config
    document: dict[str, Any] = {
        "model": host.name,
        "version": offload_moe.__version__,
        "parallel": host.worker.parallel,
        "queue": config.queue,
        "summary": None,
        "notices": [],
        "context": None,
        "has_chat_template": None,
        "has_tools": None,
        "has_reasoning": None,
        "sampling": None,
    }
    if loaded is None:
        return document
    template = loaded.prompts.format.template
    return document | {
        "summary": loaded.model.summary,
        "notices": list(loaded.model.notices),
        "context": loaded.context,
        "has_chat_template": template is not None,
        "has_tools": loaded.prompts.knows_tools,
        "has_reasoning": template is not None and re.search(r"think|<\|channel", template, re.IGNORECASE) is not None,
        "sampling": _sampling(loaded),
    }


def _sampling(loaded: Loaded) -> dict[str, Any]:
    config = loaded.model.hf.generation_config
    is_greedy = not config.do_sample
    return {
        "temperature": 0 if is_greedy else config.temperature if config.temperature is not None else 1.0,
        "top_p": config.top_p if config.top_p is not None else 1.0,
        "top_k": config.top_k if config.top_k is not None else 0,
        "max_tokens": loaded.default_max_tokens,
    }


async def tokenize(host: Host, document: Mapping[str, Any]) -> dict[str, Any]:
    """Of a text, or of messages as the model reads them. Raises: ApiError."""
    if ("content" in document) == ("messages" in document):
        raise invalid("Give content or messages, one of both.", "content")

    def ids_of(loaded: Loaded) -> list[int]:
        with loaded.lock:
            try:
                if "messages" in document:
                    return list(loaded.prompts.render(conversation_of(document, host.config)).ids)
                has_special = bool(document.get("add_special"))
                ids: list[int] = loaded.tokenizer(document["content"], add_special_tokens=has_special)["input_ids"]
                return ids
            except (ConfigError, UnicodeError) as error:
                raise invalid(str(error), "messages" if "messages" in document else "content") from error

    async with host.use() as loaded:
        ids = await to_thread.run_sync(ids_of, loaded)
    return {"tokens": ids, "count": len(ids)}


async def detokenize(host: Host, document: Mapping[str, Any]) -> dict[str, Any]:
    """The text of tokens. Raises: ApiError."""

    def text_of(loaded: Loaded) -> str:
        ids = [int(token) for token in document["tokens"]]
        with loaded.lock:
            if unknown := [token for token in ids if token >= len(loaded.tokenizer)]:
                raise invalid(f"The tokenizer has no token {unknown[0]}.", "tokens")
            return str(loaded.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    async with host.use() as loaded:
        return {"content": await to_thread.run_sync(text_of, loaded)}


def check_model(host: Host, document: Mapping[str, Any]) -> None:
    """Refuse another name than the real one, where only that is accepted. Raises: ApiError."""
    name = document.get("model")
    if host.config.is_strict_model and name not in (None, host.name):
        raise ApiError(
            404,
            f"There is no model {str(name)[:100]!r} here; this is {host.name!r}. Without --strict-model any name does.",
            code="model_not_found",
            param="model",
        )
