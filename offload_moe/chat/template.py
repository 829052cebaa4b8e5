"""Messages to token ids through the model's own chat template, and the tokens that end its turn."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from offload_moe.chat.chat_template import NO_ARGUMENTS, ChatTemplate, Message
from offload_moe.chat.reasoning import is_harmony
from offload_moe.checkpoint.token_ids import check_ids, num_embeddings
from offload_moe.errors import ConfigError
from offload_moe.families.text_model import TextModel
from offload_moe.system.texts import check_text

NO_TEMPLATE = (
    "This model has no chat template: it continues your text instead of answering it, and keeps the text so far."
)
ENCODER_DECODER = (
    "This model turns one text into another: each message stands alone, without earlier ones or the system prompt."
)
FORGETFUL_TEMPLATE = "The model's chat template leaves earlier turns out: each message stands alone."
_PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "first-question"},
    {"role": "assistant", "content": "first-answer"},
    {"role": "user", "content": "second-question"},
)


class PromptFormat:
    """How a conversation becomes a prompt.

    Without a chat template, or where `raw` ignores it, the texts are joined and continued. An encoder-decoder without
    one reads the last text alone. `notice` is the message about that for the user.
    """

    def __init__(self, hf: TextModel, tokenizer: PreTrainedTokenizerBase | None, *, raw: bool = False) -> None:
        """raw: ignore the chat template. Raises: ConfigError without a tokenizer, or see `ChatTemplate`."""
        if tokenizer is None:
            raise ConfigError(
                "The model has no tokenizer, so it cannot take text. Use model.hf.generate with token ids, or put "
                "tokenizer.json beside the weights."
            )
        self.tokenizer = tokenizer
        has_template = tokenizer.chat_template is not None and not raw
        self._num_rows = num_embeddings(hf)
        self._chat_template = ChatTemplate(tokenizer) if has_template else None
        self._reads_one_text = self._chat_template is None and bool(hf.config.is_encoder_decoder)
        self.notice = None if raw else self._notice()
        self.special_tokens: dict[int, str] = {
            token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.stop_ids = model_stop_ids(hf, tokenizer) | self._turn_ids()

    @property
    def template(self) -> str | None:
        """The template's source."""
        return self._chat_template.source if self._chat_template is not None else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> str:
        """The text of a conversation. With a generation prompt, a last assistant message is continued.

        arguments: what else a chat template reads, such as tools.

        Raises:
            ConfigError: the template cannot render it, for example a system message; or a content is not text.
        """
        for message in messages:
            check_text(message["content"], f"The {message['role']} message")
        if self._reads_one_text:
            return str(messages[-1]["content"])
        if self._chat_template is None:
            return "\n".join(message["content"] for message in messages)
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt, arguments=arguments)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt; a template has placed its own special tokens already.

        Raises:
            ConfigError: the prompt has no tokens, or the model has no embedding for one of them.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=self.template is None)["input_ids"]
        if not ids:
            raise ConfigError(
                f"The prompt has no tokens ({len(text):,} characters, of which the tokenizer keeps none), and this "
                "tokenizer adds none at the start. Give a prompt that is not empty."
            )
        check_ids(ids, self._num_rows, self.tokenizer)
        return ids

    def boundary(
        self, messages: Sequence[Message], ids: Sequence[int], arguments: Mapping[str, Any] = NO_ARGUMENTS
    ) -> int:
        """Number of prompt tokens that the next prompt is certain to begin with: all but the generation prompt.

        The last token never counts, because a request needs one token to compute.
        """
        if self.template is None:
            return len(ids) - 1
        without = self.encode(self.render(messages, add_generation_prompt=False, arguments=arguments))
        return min(common_prefix(without, ids), len(ids) - 1)

    def _notice(self) -> str | None:
        if self._reads_one_text:
            return ENCODER_DECODER
        if self._chat_template is None:
            return NO_TEMPLATE
        return FORGETFUL_TEMPLATE if min(self._chat_template.left_out(_PROBE), default=2) < 2 else None

    def _turn_ids(self) -> set[int]:
        """Special tokens the template puts between an answer and the next question: end of turn and role markers.

        In the harmony format they also separate the messages of one turn, so there only the model's own list counts.
        """
        if self.template is None or is_harmony(self.template):
            return set()
        try:
            text = self.render(_PROBE)
        except ConfigError:
            return set()
        _, answer, follow_up = _PROBE
        between = text.partition(answer["content"])[2].partition(follow_up["content"])[0]
        return {token_id for token_id, token in self.special_tokens.items() if token in between}


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens in which two sequences agree."""
    left, right = list(left), list(right)
    low, high = 0, min(len(left), len(right))
    while low < high:  # bisection, by comparisons of slices
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[low:middle] == right[low:middle] else (low, middle - 1)
    return low


def model_stop_ids(hf: TextModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """The stop tokens of the generation config, and the tokenizer's own end of text."""
    configured = hf.generation_config.eos_token_id
    ids = {*configured} if isinstance(configured, list) else {configured}
    ids.add(tokenizer.eos_token_id if tokenizer is not None else None)
    return frozenset(int(token) for token in ids if token is not None)
