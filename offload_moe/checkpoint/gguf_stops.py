"""The tokens that end an answer of a model in GGUF: those of its metadata, and others by their text.

Source: llama.cpp, src/llama-vocab.cpp, `special_eog_ids`; without its tokens between files of a repository.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload_moe.checkpoint.generation import GENERATION_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENDINGS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
    "<end_of_turn>", "<turn|>", "<|tool_response>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "</s>",
    "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<\uff5cend\u2581of\u2581sentence\uff5c>",
})  # fmt: skip
# Tokens that are only the end of a part of an answer, where all of these are there, too: of gpt-oss and Solar Open, and
# of a vocabulary with another end.
PARTS = (
    ("<|end|>", ("<|return|>", "<|call|>")),
    ("<|end|>", ("<|calls|>", "<|flush|>")),
    ("</s>", ("<|tool_response>",)),
)


def write_stops(metadata: Mapping[str, Any], tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write `generation_config.json` into a folder; nothing where no token ends an answer. metadata: of the file."""
    if stops := stop_ids(metadata, tokenizer):
        document = {"eos_token_id": stops}
        if (first := metadata.get("tokenizer.ggml.bos_token_id")) is not None:
            document["bos_token_id"] = first
        (folder / GENERATION_CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def stop_ids(metadata: Mapping[str, Any], tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The end of a text first. Of a token that is known by its text, only one that the file marks as control."""
    named = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    known = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content in ENDINGS
    }
    for part, others in PARTS:
        if all(other in known for other in others):
            known.pop(part, None)
    ids = [number for number in named if type(number) is int and 0 <= number < len(tokenizer)]
    return [*dict.fromkeys([*ids, *sorted(known.values())])]
