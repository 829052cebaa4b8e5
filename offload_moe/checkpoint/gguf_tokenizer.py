"""The tokenizer and the chat template of a GGUF file, through transformers' own integration."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_moe.checkpoint.gguf_splits import SAME, SPLITS
from offload_moe.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

# Splits of text that are GPT-2's own, which transformers takes where a file names none of its own.
# Source: llama.cpp, src/llama-vocab.cpp.
OF_GPT2 = ("gpt-2", "gpt2", "olmo", "mpt", "phi-2", "jina-es", "jina-de", "roberta-bpe")
ADVICE = (
    "Put config.json and tokenizer.json of the original model beside it, in a folder of its own, and quantize that "
    "folder."
)


def write_tokenizer(path: Path, metadata: Mapping[str, Any], folder: Path) -> "PreTrainedTokenizerFast | None":
    """Write the tokenizer of a GGUF file into a folder, as transformers saves one; None if the file has none.

    metadata: of the file. Raises: CheckpointError for one that would split texts otherwise than the model learned.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    if metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return None
    template = metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise CheckpointError(f"{path}: its tokenizer.chat_template is {template!r}, which is no text. {ADVICE}")
    rule = str(metadata.get("tokenizer.ggml.pre", ""))
    _check_split(path, metadata.get("tokenizer.ggml.model"), rule)
    try:
        architecture, content, settings = get_gguf_tokenizer(str(path))
        backend, more = convert_gguf_tokenizer(architecture, content | {"pre_tokenizer_type": SAME.get(rule, rule)})
        if rule in SPLITS:
            backend.pre_tokenizer = _splitting(SPLITS[rule])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **more)
        tokenizer.save_pretrained(folder)
        return tokenizer
    except Exception as error:  # the integration may raise anything for foreign metadata
        raise CheckpointError(f"{path}: its tokenizer cannot be read: {error}. {ADVICE}") from error


def _splitting(expressions: tuple[str, ...]) -> "PreTokenizer":
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    splits = [Split(Regex(expression), behavior="isolated") for expression in expressions]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _check_split(path: Path, model: object, split: object) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if model == "gpt2" and split not in (*GGUF_PRE_TOKENIZER_SPLITS, *OF_GPT2, *SAME, *SPLITS):
        raise CheckpointError(
            f"{path}: its tokenizer splits texts in a way named {split!r} (tokenizer.ggml.pre), which is not known "
            f"here: texts would become other tokens than the model learned. {ADVICE}"
        )
