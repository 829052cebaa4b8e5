"""From a checked request to one that the engine takes: rendered, and refused here where it cannot be answered."""

import logging

from offload_moe.errors import ConfigError
from offload_moe.serve.errors import PromptTooLong, invalid
from offload_moe.serve.guide import Grammar
from offload_moe.serve.host import Loaded
from offload_moe.serve.jobs import Request
from offload_moe.serve.prompts import Conversation, Prompts, Rendered
from offload_moe.serve.sampling import check_bias
from offload_moe.serve.settings import Settings
from offload_moe.serve.tools.formats import HARMONY
from offload_moe.serve.tools.grammars import answer_or_call, arguments_grammar, forced_grammar
from offload_moe.serve.tools.tool import ToolUse

logger = logging.getLogger(__name__)


def prepare_chat(
    loaded: Loaded,
    identity: str,
    conversation: Conversation,
    settings: Settings,
    *,
    grammar: Grammar | None = None,
    num_choices: int = 1,
) -> Request:
    """Render a conversation and check that it can be answered. Raises: ApiError."""
    tools, prompts = conversation.tools, loaded.prompts
    check_bias(settings, loaded.num_logits)
    with loaded.lock:
        rendered = render(loaded, conversation)
        grammars = [] if grammar is None or tools.forced else [grammar]
        grammars += _strict_grammars(prompts, tools)
        grammar = _whole_grammar(prompts, tools, grammar)
        grammars += [] if grammar is None else [grammar]
        guides = loaded.guides if grammars else None
    if guides is not None:
        for each in grammars:
            guides.make(each)  # what cannot be compiled is refused now
    return Request(
        id=identity,
        prompts=loaded.prompts,
        rendered=rendered,
        settings=settings,
        num_choices=num_choices,
        tools=tools,
        grammar=grammar,
        guides=guides,
    )


def _strict_grammars(prompts: Prompts, tools: ToolUse) -> list[Grammar]:
    """Of the tools whose arguments follow their schemas."""
    strict = [tool for tool in tools.callable.values() if tool.is_strict]
    if strict and prompts.has_own_parser:
        logger.warning("The arguments of strict tools are not held to their schemas: the tokenizer reads calls itself")
        return []
    return [arguments_grammar(prompts.call_format, tool, prompts.special_ids) for tool in strict]


def _whole_grammar(prompts: Prompts, tools: ToolUse, answer: Grammar | None) -> Grammar | None:
    """Of the whole answer: a call that is required; or what was asked for, or a call instead. Raises: ApiError."""
    if tools.forced:
        if prompts.has_own_parser:
            raise invalid(
                "A call cannot be required of this model: the format is a part of its tokenizer.", "tool_choice"
            )
        chosen = [tools.callable[name] for name in tools.forced]
        return forced_grammar(prompts.call_format, chosen, prompts.special_ids)
    has_channels = prompts.call_format is HARMONY  # where calls stand beside the answer
    if answer is None or answer.kind != "json" or not tools.callable or prompts.has_own_parser or has_channels:
        return answer
    return answer_or_call(answer, prompts.call_format, [*tools.callable.values()], prompts.special_ids)


def render(loaded: Loaded, conversation: Conversation) -> Rendered:
    """The lock is held. Raises: ApiError."""
    try:
        rendered = loaded.prompts.render(conversation)
    except ConfigError as error:
        raise invalid(str(error), conversation.param) from error
    check_length(loaded, len(rendered.ids), conversation.param)
    return rendered


def check_length(loaded: Loaded, num_tokens: int, param: str) -> None:
    """Refuse a prompt that leaves no token of the context. Raises: ApiError."""
    if loaded.context is not None and num_tokens >= loaded.context:
        raise PromptTooLong(num_tokens, loaded.context, param)
