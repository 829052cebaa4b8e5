"""A byte-level tokenizer with a ChatML template, and tiny models that speak its vocabulary."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from offload_moe.chat import ChatSession
from offload_moe.convert.quantize import quantize

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "[THINK]"]
END_OF_TEXT = 256
VOCABULARY_SIZE = 264

FORGETFUL = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "num_hidden_layers": 2},
    "qwen3_next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_hidden_layers": 4,
    },
}


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, so a character outside ASCII spans several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", additional_special_tokens=SPECIAL_TOKENS
    )
    fast.chat_template = template
    return fast


def chat_model(family: str = "llama", **changes: object) -> PreTrainedModel:
    """A random model in fp32 with a context of 512 tokens that does not stop by itself."""
    settings = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "eos_token_id": END_OF_TEXT,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(family, **(settings | FORGETFUL.get(family, {}) | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    return model


class Scripted:
    """Makes a model say given tokens, whatever it computes."""

    def __init__(self, model: PreTrainedModel, tokens: list[int]) -> None:
        self.model, self.tokens = model, tokens
        self.num_calls = 0
        self._handle = model.register_forward_hook(self._replace)

    def _replace(self, module: torch.nn.Module, inputs: object, output: object) -> object:
        token = self.tokens[min(self.num_calls, len(self.tokens) - 1)]
        self.num_calls += 1
        output.logits = torch.full_like(output.logits, -10.0)
        output.logits[..., token] = 10.0
        return output

    def remove(self) -> None:
        self._handle.remove()


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chat_store(folder: Path, family: str = "qwen3_moe", **changes: object) -> Path:
    """A store of a tiny model with eight experts per layer, two of them chosen, that can be chatted with."""
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = chat_model(family, **(sizes | changes))
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    return quantize(folder / "model", folder / "store")


def say(session: ChatSession, text: str) -> str:
    """The greedy answer, cut short."""
    return "".join(piece.text for piece in session.send(text, temperature=0, max_new_tokens=12))
