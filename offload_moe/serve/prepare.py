"""From a checked request to one that the engine takes: rendered, and refused here where it cannot be answered."""

from offload_moe.errors import ConfigError
from offload_moe.serve.errors import PromptTooLong, invalid
from offload_moe.serve.guide import Grammar
from offload_moe.serve.host import Loaded
from offload_moe.serve.jobs import Request
from offload_moe.serve.prompts import Conversation, Rendered
from offload_moe.serve.sampling import check_bias
from offload_moe.serve.settings import Settings
from offload_moe.serve.tools.forced import forced_grammar


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
    tools = conversation.tools
    check_bias(settings, loaded.num_logits)
    with loaded.lock:
        rendered = render(loaded, conversation)
        if tools.forced and loaded.prompts.has_own_parser:
            raise invalid(
                "A call cannot be required of this model: the format is a part of its tokenizer.", "tool_choice"
            )
        if tools.forced:
            chosen = [tools.callable[name] for name in tools.forced]
            special = {text: token for token, text in loaded.prompts.format.special_tokens.items()}
            grammar = forced_grammar(loaded.prompts.call_format, chosen, special)
        needs_guides = grammar is not None or any(tool.is_strict for tool in tools.callable.values())
        guides = loaded.guides if needs_guides else None
    if grammar is not None and guides is not None:
        guides.make(grammar)  # what cannot be compiled is refused now
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


def render(loaded: Loaded, conversation: Conversation) -> Rendered:
    """The lock is held. Raises: ApiError."""
    try:
        rendered = loaded.prompts.render(conversation)
    except ConfigError as error:
        raise invalid(str(error), "messages") from error
    check_length(loaded, len(rendered.ids))
    return rendered


def check_length(loaded: Loaded, num_tokens: int) -> None:
    """Refuse a prompt that leaves no token of the context. Raises: ApiError."""
    if loaded.context is not None and num_tokens >= loaded.context:
        raise PromptTooLong(num_tokens, loaded.context)
