"""Messages to token ids through the model's own chat template, and the tokens that end its turn."""

from collections.abc import Sequence
from itertools import takewhile

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload_moe.chat.reasoning import is_harmony
from offload_moe.errors import ConfigError
from offload_moe.token_ids import check_ids, num_embeddings

Message = dict[str, str]

NO_TEMPLATE = (
    "This model has no chat template: it continues your text instead of answering it, and remembers the text so far."
)
ENCODER_DECODER = (
    "This model turns one text into another: each message stands alone, without earlier ones or the system prompt."
)
_PROBE = ("first-question", "first-answer", "second-question")


class PromptFormat:
    """How a conversation becomes a prompt.

    Without a chat template, or where `raw` ignores it, the texts are joined and continued. An encoder-decoder without
    one reads the last text alone. `notice` is what the user must know of that.
    """

    def __init__(self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, raw: bool = False) -> None:
        if tokenizer is None:
            raise ConfigError(
                "The model has no tokenizer, so it cannot take text. Use model.hf.generate with token ids, or put "
                "tokenizer.json beside the weights."
            )
        self.tokenizer = tokenizer
        self._num_rows = num_embeddings(hf)
        self.template: str | None = None
        if tokenizer.chat_template is not None and not raw:
            self.template = tokenizer.get_chat_template()
        self._reads_one_text = self.template is None and bool(hf.config.is_encoder_decoder)
        self.notice: str | None = None
        if self.template is None and not raw:
            self.notice = ENCODER_DECODER if self._reads_one_text else NO_TEMPLATE
        self.special_tokens: dict[int, str] = {
            token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.stop_ids = model_stop_ids(hf, tokenizer) | self._turn_ids()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as the model reads it.

        Raises:
            ConfigError: the template refuses it, for example a system message.
        """
        if self._reads_one_text:
            return messages[-1]["content"]
        if self.template is None:
            return "\n".join(message["content"] for message in messages)
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except TemplateError as error:
            raise ConfigError(
                f"The model's chat template refuses this conversation: {error}. It may have no system role, or want "
                "question and answer in turn."
            ) from error
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt; a template has placed its own special tokens already.

        Raises: ConfigError for a token that the model has no embedding for.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=self.template is None)["input_ids"]
        check_ids(ids, self._num_rows, self.tokenizer)
        return ids

    def boundary(self, messages: Sequence[Message], ids: Sequence[int]) -> int:
        """How many tokens of the prompt are certain to open the next prompt too: all but the generation prompt.

        The last token is never among them, because generating needs one token to compute.
        """
        if self.template is None:
            return len(ids) - 1
        without = self.encode(self.render(messages, add_generation_prompt=False))
        return min(common_prefix(without, ids), len(ids) - 1)

    def _turn_ids(self) -> set[int]:
        """Special tokens the template puts between an answer and the next question: end of turn and role markers.

        In the harmony format they also separate the messages of one turn, so there only the model's own list counts.
        """
        if self.template is None or is_harmony(self.template):
            return set()
        question, answer, follow_up = _PROBE
        conversation = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": follow_up},
        ]
        try:
            text = self.render(conversation)
        except ConfigError:
            return set()
        between = text.partition(answer)[2].partition(follow_up)[0]
        return {token_id for token_id, token in self.special_tokens.items() if token in between}


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens in which two sequences agree."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def model_stop_ids(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """The stop tokens of the generation config, and the tokenizer's own end of text."""
    configured = hf.generation_config.eos_token_id
    ids = {*configured} if isinstance(configured, list) else {configured}
    ids.add(tokenizer.eos_token_id if tokenizer is not None else None)
    return frozenset(int(token) for token in ids if token is not None)
