"""A model's chat template: the text it renders from messages, and the messages it omits."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from offload_moe.errors import ConfigError

Message = dict[str, Any]  # role and content are strings; a template may read more
NO_ARGUMENTS: Mapping[str, Any] = {}
MAX_ERROR_CHARACTERS = 300


class ChatTemplate:
    """Renders messages. Contents are strings; a template that reads only lists of parts receives lists."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the tokenizer's template. Raises: ConfigError when it has several and none is the default."""
        self._tokenizer = tokenizer
        try:
            self.source: str = tokenizer.get_chat_template()
        except ValueError as error:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise ConfigError(
                f"The tokenizer has the chat templates {names}, and none is the default. Choose one in Python "
                "(model.tokenizer.chat_template = model.tokenizer.chat_template[NAME]), or continue text with --raw."
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> str:
        """The text of a conversation. With a generation prompt, a last assistant message is continued.

        arguments: what else the template reads, such as tools.

        Raises:
            ConfigError: the template refuses the conversation, fails on it, or omits a message that needs an answer.
        """
        as_parts, left_out = self._fit(messages, arguments)
        _check_left_out(messages, left_out)
        is_continued = add_generation_prompt and unfinished(messages) is not None
        if add_generation_prompt and not is_continued and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        try:
            return self._apply(
                _contents(messages, as_parts),
                add_generation_prompt=add_generation_prompt and not is_continued,
                continue_final_message=is_continued,
                **arguments,
            )
        except Exception as error:  # a template may raise anything
            raise ConfigError(_failure(error)) from error

    def left_out(self, messages: Sequence[Message]) -> list[int]:
        """Indices of the messages whose contents the template omits."""
        return self._fit(messages, NO_ARGUMENTS)[1]

    def _fit(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> tuple[Collection[int], list[int]]:
        """Indices of the messages to pass as lists of parts, and of those omitted in any form.

        Markers replace the contents, since a template may trim or escape text. Where the template refuses every form,
        no message counts as omitted, and `render` reports the refusal.
        """
        everything = range(len(messages))
        best: Collection[int] = ()
        fewest = missing = self._missing(messages, best, arguments)
        for as_parts in (
            everything if missing is None else missing,
            [index for index in everything if messages[index]["role"] != "system"],
            everything,
        ):
            if fewest == []:
                break
            missing = self._missing(messages, as_parts, arguments)
            if missing is not None and (fewest is None or len(missing) < len(fewest)):
                best, fewest = as_parts, missing
        return best, fewest or []

    def _missing(
        self, messages: Sequence[Message], as_parts: Collection[int], arguments: Mapping[str, Any]
    ) -> list[int] | None:
        """Indices of the contents missing from the rendered text; None where rendering fails."""
        markers = [f"zq{index}qz" for index in range(len(messages))]
        marked = [message | {"content": marker} for message, marker in zip(messages, markers, strict=True)]
        try:
            text = self._apply(_contents(marked, as_parts), add_generation_prompt=False, **arguments).lower()
        except Exception:  # as in `render`
            return None
        return [index for index, marker in enumerate(markers) if not _is_text_of(marker, text)]

    def _apply(self, messages: list[dict[str, Any]], **settings: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **settings))


def _is_text_of(marker: str, text: str) -> bool:
    """Whether the marker appears as text, not only within a list printed in Python's or JSON's syntax."""
    return re.search(rf"""(?<!['"]text['"]: ['"]){marker}""", text) is not None


def unfinished(messages: Sequence[Message]) -> str | None:
    """The beginning of an answer at the end of a conversation; None where there is none."""
    last = messages[-1] if messages else {"role": "user"}
    is_begun = last["role"] == "assistant" and not last.get("tool_calls") and last["content"].strip()
    return last["content"] if is_begun else None


def _contents(messages: Sequence[Message], as_parts: Collection[int]) -> list[dict[str, Any]]:
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]} if index in as_parts else dict(message)
        for index, message in enumerate(messages)
    ]


def _check_left_out(messages: Sequence[Message], left_out: Sequence[int]) -> None:
    """Refuse to omit the system prompt, or a message behind the last finished answer."""
    answers = [index for index, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
    last_answer = answers[-1] if answers else -1
    for index in left_out:
        role = messages[index]["role"]
        if role == "system":
            raise ConfigError(
                "The model's chat template leaves the system prompt out, so it would have no effect. Put it into the "
                "first message."
            )
        if index > last_answer:
            raise ConfigError(
                f"The model's chat template leaves the text of the last {role} message out, as a string and as a list "
                "of parts. Continue text without the template (--raw), or take a checkpoint whose template is for text."
            )


def _failure(error: Exception) -> str:
    words = next(iter(str(error).strip().splitlines()), "")[:MAX_ERROR_CHARACTERS].rstrip(".")
    if type(error) is TemplateError:  # what `raise_exception` in a template raises
        return (
            f"The model's chat template refuses this conversation: {words}. It may have no system role, or need "
            "question and answer in turn."
        )
    return (
        f"The model's chat template fails on this conversation ({type(error).__name__}: {words}). Try a newer revision "
        "of the checkpoint, or continue text without the template (--raw)."
    )
