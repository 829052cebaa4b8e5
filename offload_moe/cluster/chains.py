"""The beginning of a request's conversation as a chain of hashes: requests that begin alike have chains that do.

It is read as clients send it, without template and tokenizer: an ingress needs no model. A link ends with each
message and, within long ones, after every `BLOCK` characters.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from offload_moe.serve.errors import as_mapping

BLOCK = 512  # characters
MOST_LINKS = 8192  # of a chain; what lies behind them counts as new
TOOLS = "tools"
MARKS = ("cache_control",)  # fields that clients move from message to message

Piece = tuple[str, str]  # a role, or what else it is, and the text


@dataclass(frozen=True, slots=True)
class Chain:
    """The links of one conversation.

    keys: of each link, which stand for everything before them too. lengths: characters up to the end of each.
    """

    keys: Sequence[object] = ()
    lengths: Sequence[int] = ()

    @property
    def length(self) -> int:
        return self.lengths[-1] if self.lengths else 0


NO_CHAIN = Chain()


def chain_of(path: str, body: bytes, ignore_prefix: str | None = None) -> Chain:
    """Of a request to one of the routes that answer; empty for others, and for a body that is none.

    ignore_prefix: a pattern removed from the beginning of the first message, as the servers do.
    """
    read = READERS.get(path)
    if read is None:
        return NO_CHAIN
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return NO_CHAIN
    return chain_of_pieces(_ignoring(read(as_mapping(document)), ignore_prefix))


def chain_of_pieces(pieces: Iterable[Piece]) -> Chain:
    keys: list[object] = []
    lengths: list[int] = []
    key, length = b"", 0
    for kind, text in pieces:
        for at in range(0, len(text) or 1, BLOCK):
            block = text[at : at + BLOCK]
            is_end = at + BLOCK >= len(text)
            parts = json.dumps([kind, block, is_end]).encode()
            key = blake2b(key + parts, digest_size=12).digest()
            length += len(block)
            keys.append(key)
            lengths.append(length)
            if len(keys) == MOST_LINKS:
                return Chain(keys, lengths)
    return Chain(keys, lengths)


def _chat(document: Mapping[str, Any]) -> Iterator[Piece]:
    yield from _field(document, TOOLS)
    yield from _messages(document.get("messages"))


def _completion(document: Mapping[str, Any]) -> Iterator[Piece]:
    yield from _field(document, "prompt")


def _response(document: Mapping[str, Any]) -> Iterator[Piece]:
    yield from _field(document, "instructions")
    yield from _field(document, TOOLS)
    if isinstance(document.get("input"), list):
        yield from _messages(document["input"])
    else:
        yield "user", _text(document.get("input"))


def _anthropic(document: Mapping[str, Any]) -> Iterator[Piece]:
    yield from _field(document, "system")
    yield from _field(document, TOOLS)
    yield from _messages(document.get("messages"))


READERS = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": _response,
    "/v1/messages": _anthropic,
}


def _field(document: Mapping[str, Any], name: str) -> Iterator[Piece]:
    if document.get(name):
        yield name, _text(document[name])


def _messages(messages: Any) -> Iterator[Piece]:
    for message in messages if isinstance(messages, list) else ():
        rest = {name: value for name, value in as_mapping(message).items() if name not in ("role", "content")}
        said = _text(as_mapping(message).get("content"))
        yield str(as_mapping(message).get("role")), said + (_text([rest]) if rest else "")


def _text(value: Any) -> str:
    """Of a text, of parts with texts, or of anything else as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return "".join(map(_part, value)) if isinstance(value, list) else _part(value)


def _part(part: Any) -> str:
    if isinstance(as_mapping(part).get("text"), str):
        return str(part["text"])
    if isinstance(part, dict):
        part = {name: value for name, value in part.items() if name not in MARKS}
    return json.dumps(part, sort_keys=True)


def _ignoring(pieces: Iterator[Piece], pattern: str | None) -> Iterator[Piece]:
    for kind, text in pieces:
        if pattern is not None and kind != TOOLS:
            yield kind, re.sub(rf"\A(?:{pattern})", "", text)
            pattern = None
        else:
            yield kind, text
