"""The metadata of a tokenizer whose merges reach across every split, so that other splits give other tokens."""

import json
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

# Without whitespace beyond ASCII, which llama.cpp's expressions take for another character. Latin, Chinese, Japanese,
# Korean, Russian, quotation marks.
TEXT = (
    "Hello, world!  It's 12345 o'clock -- don't PANIC; we'll see 3.14159 and x1y22z333.\n\tdef f(a_b): return {"
    '"k": [1, 20, 300]}  # ok\r\n\r\n   spaced    out   \n\n\n\u4f60\u597d\u4e16\u754c\uff0c\u4eca\u5929'
    "\u662f2026\u5e7411\u6708\u3002 \u3053\u3093\u306b\u3061\u306f \u30ab\u30bf\u30ab\u30ca \uc548\ub155\ud558"
    "\uc138\uc694 \u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u00dcn\u00efc\u00f6d\u00e9 \u01c5 "
    "\u00aa\u00ba \u00e9t\u00e9. (\u201cquoted\u201d) \u2014 \u2018single\u2019 $5 <b>&amp;</b> 50%  end  "
)


def metadata_of(rule: str, vocab_size: int) -> dict[str, Any]:
    """Of a file with a vocabulary of that size, learned on the text without any split. rule: `tokenizer.ggml.pre`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    pieces = [TEXT[start : start + 12] for start in range(0, len(TEXT), 3)]
    tokenizer.train_from_iterator(pieces * 2, trainer)
    tokens = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__), "<|end|>"]
    assert len(tokens) == vocab_size, len(tokens)
    model = json.loads(tokenizer.to_str())["model"]
    return {
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (vocab_size - 1) + [3],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": vocab_size - 1,
    }
