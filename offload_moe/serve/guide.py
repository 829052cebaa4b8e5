"""Structured output: a grammar decides which tokens may come next.

T tokens, V vocabulary: the width of the logits, which may exceed the tokenizer's.
"""

import json
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from offload_moe.serve.errors import ApiError, invalid

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Blanks as models write them, and no others: each is then forced, and none repeats without an end.
JSON_STYLE: "JsonCompileOptions" = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MOST_COMPILED = 64  # grammars that are kept
ANY_OBJECT = '{"type": "object"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer must be. kind: "any" is Lark's or llama.cpp's form. param: the request's field, for errors."""

    kind: Literal["json", "lark", "regex", "any"]
    source: str
    param: str = "response_format"
    is_whole: bool = False  # holds from the first token on, without reasoning before


def json_grammar(schema: Mapping[str, Any], param: str = "response_format") -> Grammar:
    return Grammar(kind="json", source=json.dumps(schema), param=param)


class Guides:
    """Makes guides for one model.

    Raises: ApiError where the tokenizer is not one of the Rust library, or llguidance is not installed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], width: int) -> None:
        """width: V."""
        try:
            import llguidance
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise invalid("Structured output needs llguidance: pip install 'offload-moe[serve]'.") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise invalid(
                f"Structured output needs a fast tokenizer, and this model has a {type(tokenizer).__name__}. Send the "
                "request without response_format, grammar, strict and forced tools."
            )
        self.width = width
        self.stop_ids = frozenset(stop_ids)
        self._library = llguidance
        self.tokenizer = from_tokenizer(tokenizer, n_vocab=width, eos_token=sorted(stop_ids) or None)
        self._compiled = lru_cache(maxsize=MOST_COMPILED)(self._compile)
        self._lock = threading.Lock()

    def make(self, grammar: Grammar) -> "Guide":
        """At the grammar's beginning. Raises: ApiError when it cannot be compiled."""
        with self._lock:
            matcher = self._compiled(grammar).deep_copy()
        return Guide(matcher, self, is_whole=grammar.is_whole)

    def _compile(self, grammar: Grammar) -> Any:
        library = self._library
        try:
            source = self._source(grammar)
        except ValueError as error:
            raise invalid(f"The grammar is not usable: {error}", grammar.param) from error
        matcher = library.LLMatcher(self.tokenizer, source, log_level=0)
        if matcher.is_error():
            words = matcher.get_error().strip()
            what = "schema" if grammar.kind == "json" else "grammar"
            raise invalid(f"The {what} cannot be compiled: {words}", grammar.param)
        return matcher

    def _source(self, grammar: Grammar) -> str:
        matcher = self._library.LLMatcher
        if grammar.kind == "json":
            return str(matcher.grammar_from_json_schema(grammar.source, overrides=JSON_STYLE))
        if grammar.kind == "regex":
            return str(matcher.grammar_from_regex(grammar.source))
        if grammar.kind == "lark":
            return str(matcher.grammar_from_lark(grammar.source))
        return str(self._library.grammar_from("grammar", grammar.source))


class Guide(LogitsProcessor):
    """One answer's place in its grammar. While it is not active, every token may come.

    openings: tokens that may come in place of the grammar's first one, as those that begin reasoning.
    """

    def __init__(self, matcher: Any, guides: Guides, *, is_whole: bool = False) -> None:
        self.is_whole = is_whole
        self.matcher, self._guides = matcher, guides
        self.is_active = True
        self.openings: frozenset[int] = frozenset()

    @property
    def is_complete(self) -> bool:
        """Whether nothing but a stop token may follow."""
        return bool(self.matcher.is_stopped())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: ``[1, T]``, scores: ``[1, V]``."""
        if not self.is_active:
            return scores
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if self.matcher.is_error():
            raise ApiError(500, f"The grammar cannot be followed any further: {self.matcher.get_error().strip()}")
        allowed = torch.from_numpy(np.unpackbits(bits, count=self._guides.width, bitorder="little")).bool()
        if self.openings:
            allowed[sorted(self.openings)] = True
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def take(self, token: int) -> bool:
        """The token was chosen; False where the grammar does not have it."""
        if token in self._guides.stop_ids:
            return True
        if token in self.openings and not self.matcher.validate_tokens([token]):
            return False
        self.openings = frozenset()
        return bool(self.matcher.consume_token(token))

    def take_text(self, text: str) -> bool:
        """Text that was written before the guide became active."""
        if not text:
            return True
        tokens = self._guides.tokenizer.tokenize_str(text, parse_special=True)
        is_valid = self.matcher.validate_tokens(tokens) == len(tokens)
        return is_valid and bool(self.matcher.consume_tokens(tokens))

    def forced(self) -> Sequence[int]:
        """The only tokens that may come next."""
        return self.matcher.compute_ff_tokens() if self.is_active and not self.openings else ()
