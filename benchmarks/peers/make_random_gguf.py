"""Write a Q4_0 GGUF file with random weights in the shape of a Qwen3-MoE model, for llama.cpp to be measured on.

Usage: python benchmarks/peers/make_random_gguf.py CONFIG.json OUT.gguf

OLMoE's shape is written as Qwen3-MoE too: same matrices, one norm more per head. Codes are drawn from 1 to 15, so that
weights have zero mean: with a mean, every token collapses onto the same experts.
"""

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import finish

Q4 = gguf.GGMLQuantizationType.Q4_0


class RandomGguf:
    """One file being written."""

    def __init__(self, path: Path, config: dict[str, int]) -> None:
        self.config = config
        self.random = np.random.default_rng(0)
        self.writer = gguf.GGUFWriter(str(path), "qwen3moe")

    def write(self) -> None:
        self._metadata()
        self._tokenizer()
        hidden, vocabulary = self.config["hidden_size"], self.config["vocab_size"]
        self._quantized("token_embd.weight", vocabulary, hidden, std=1.0)
        self._norm("output_norm.weight", hidden)
        self._quantized("output.weight", vocabulary, hidden)
        for layer in range(self.config["num_hidden_layers"]):
            self._layer(f"blk.{layer}.")
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()

    def _metadata(self) -> None:
        c, w = self.config, self.writer
        w.add_block_count(c["num_hidden_layers"])
        w.add_context_length(4096)
        w.add_embedding_length(c["hidden_size"])
        w.add_feed_forward_length(c["expert_intermediate"])
        w.add_head_count(c["num_attention_heads"])
        w.add_head_count_kv(c["num_key_value_heads"])
        w.add_key_length(c["head_dim"])
        w.add_value_length(c["head_dim"])
        w.add_layer_norm_rms_eps(1e-6)
        w.add_rope_freq_base(10000.0)
        w.add_vocab_size(c["vocab_size"])
        w.add_expert_count(c["num_experts"])
        w.add_expert_used_count(c["num_experts_per_tok"])
        w.add_expert_feed_forward_length(c["expert_intermediate"])

    def _tokenizer(self) -> None:
        """Any tokenizer will do: prompts are given as ids. llama.cpp wants the byte alphabet of GPT-2 all the same."""
        tokens = [f"<t{index}>" for index in range(self.config["vocab_size"])]
        extra = 0
        for byte in range(256):
            is_printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
            tokens[byte] = chr(byte) if is_printable else chr(256 + extra)
            extra += not is_printable
        self.writer.add_tokenizer_model("gpt2")
        self.writer.add_tokenizer_pre("default")
        self.writer.add_token_list(tokens)
        self.writer.add_token_types([1] * self.config["vocab_size"])
        self.writer.add_token_merges(["a b"])
        self.writer.add_bos_token_id(0)
        self.writer.add_eos_token_id(1)

    def _layer(self, prefix: str) -> None:
        c = self.config
        hidden, intermediate, experts = c["hidden_size"], c["expert_intermediate"], c["num_experts"]
        query, key = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        for name, length in (("attn_norm", hidden), ("ffn_norm", hidden)):
            self._norm(f"{prefix}{name}.weight", length)
        for name in ("attn_q_norm", "attn_k_norm"):
            self._norm(f"{prefix}{name}.weight", c["head_dim"])
        for name, out in (("attn_q", query), ("attn_k", key), ("attn_v", key)):
            self._quantized(f"{prefix}{name}.weight", out, hidden)
        self._quantized(f"{prefix}attn_output.weight", hidden, query)
        router = self.random.standard_normal((experts, hidden), np.float32) * 0.05
        self.writer.add_tensor(f"{prefix}ffn_gate_inp.weight", router)
        self._quantized(f"{prefix}ffn_gate_exps.weight", experts, intermediate, hidden)
        self._quantized(f"{prefix}ffn_up_exps.weight", experts, intermediate, hidden)
        self._quantized(f"{prefix}ffn_down_exps.weight", experts, hidden, intermediate)

    def _quantized(self, name: str, *shape: int, std: float = 0.02) -> None:
        num_blocks = int(np.prod(shape)) // 32
        data = np.empty((num_blocks, 18), np.uint8)
        low, high = (self.random.integers(1, 16, (num_blocks, 16), np.uint8) for _ in range(2))
        data[:, 2:] = low | high << 4
        data[:, :2] = np.full(num_blocks, std / 4.3, np.float16).view(np.uint8).reshape(num_blocks, 2)
        self.writer.add_tensor(name, data.reshape(*shape[:-1], shape[-1] // 32 * 18), raw_dtype=Q4)

    def _norm(self, name: str, length: int) -> None:
        self.writer.add_tensor(name, np.ones(length, np.float32))


def shape_of(config_file: Path) -> dict[str, int]:
    """The dimensions of a config.json, under the names used here."""
    config = json.loads(config_file.read_text())
    return {
        **{k: config[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")},
        **{k: config[k] for k in ("num_attention_heads", "num_key_value_heads")},
        "num_experts": config.get("num_experts") or config["num_local_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "expert_intermediate": config.get("moe_intermediate_size") or config["intermediate_size"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("gguf", type=Path)
    options = parser.parse_args()
    RandomGguf(options.gguf, shape_of(options.config)).write()
    num_bytes = options.gguf.stat().st_size
    finish({"benchmark": "make_random_gguf", "shape": options.config.stem, "gguf_bytes": num_bytes})


if __name__ == "__main__":
    main()
