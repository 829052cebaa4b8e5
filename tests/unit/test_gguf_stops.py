"""Which tokens of a GGUF file's vocabulary end an answer."""

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from offload_moe.checkpoint.gguf_stops import stop_ids

OF_HARMONY = ["<|return|>", "<|start|>", "<|end|>", "<|call|>"]


@pytest.mark.parametrize(
    ("control", "metadata", "expected"),
    [
        (["<|endoftext|>", "<|user|>", "<|observation|>"], {"eos": 0, "eot": 1, "eom": 2}, [0, 1, 2]),  # GLM
        (OF_HARMONY, {"eos": 0}, [0, 3]),  # <|end|> ends a part of gpt-oss's answers
        (["<|end|>", "<|flush|>", "<|calls|>"], {"eos": 1}, [1, 2]),
        (["<s>", "<|end|>"], {"eos": 0}, [0, 1]),
        (["<s>", "</s>", "<|tool_response>"], {}, [2]),
        (["<s>"], {"eos": 40, "eot": -1, "eom": None}, []),
    ],
)
def test_stops(control: list[str], metadata: dict[str, Any], expected: list[int]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    tokenizer.add_tokens([AddedToken(text, special=True) for text in control], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False)])
    assert (
        stop_ids({f"tokenizer.ggml.{name}_token_id": token for name, token in metadata.items()}, tokenizer) == expected
    )
