"""Write a GGUF file with random weights in the shape of a model, for llama.cpp to be measured on.

Usage: python benchmarks/peers/make_random_gguf.py CONFIG.json OUT.gguf

Matrices are Q4_0, experts of gpt-oss MXFP4, routers, norms and biases fp32. Which models: gguf_shapes.py. Weights have
zero mean (with a mean, every token collapses onto the same experts) and unit gain.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from gguf_shapes import Model, Tensor, model_of
from harness import finish

BLOCK = 32
POOL_BLOCKS = 1 << 21
Q4_STD = 4.32  # of codes drawn evenly from -7 to 7
MXFP4_STD = 2.93
ROUTER_GAIN = 2.0  # router logits of this spread give a top-k that differs from token to token


class RandomGguf:
    """One file being written. Codes are runs of one pool of random bytes, so that writing is as fast as the disk."""

    def __init__(self, path: Path, model: Model) -> None:
        self._model = model
        self._random = np.random.default_rng(0)
        self._writer = gguf.GGUFWriter(str(path), model.architecture)
        low, high = (self._random.integers(1, 16, (POOL_BLOCKS, 16), np.uint8) for _ in range(2))
        self._pools = {
            "Q4_0": low | high << 4,
            "MXFP4": self._random.integers(0, 256, (POOL_BLOCKS, 16), np.uint8),
        }

    def write(self) -> None:
        for name, value in self._model.metadata.items():
            getattr(self._writer, f"add_{name}")(gguf.RopeScalingType(value) if name == "rope_scaling_type" else value)
        self._tokenizer(self._model.metadata["vocab_size"])
        for tensor in self._model.tensors:
            self._declare(tensor)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        for tensor in self._model.tensors:
            self._writer.write_tensor_data(self._data(tensor))
        self._writer.close()

    def _tokenizer(self, vocabulary: int) -> None:
        """Any tokenizer will do: prompts are given as ids. llama.cpp wants the byte alphabet of GPT-2 all the same."""
        tokens = [f"<t{index}>" for index in range(vocabulary)]
        extra = 0
        for byte in range(256):
            is_printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
            tokens[byte] = chr(byte) if is_printable else chr(256 + extra)
            extra += not is_printable
        self._writer.add_tokenizer_model("gpt2")
        self._writer.add_tokenizer_pre("default")
        self._writer.add_token_list(tokens)
        self._writer.add_token_types([1] * vocabulary)
        self._writer.add_token_merges(["a b"])
        self._writer.add_bos_token_id(0)
        self._writer.add_eos_token_id(1)

    def _type(self, tensor: Tensor) -> str:
        return {"dense": "Q4_0", "expert": self._model.expert_type}.get(tensor.kind, "F32")

    def _declare(self, tensor: Tensor) -> None:
        kind = self._type(tensor)
        if kind == "F32":
            self._writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), 4 * math.prod(tensor.shape))
            return
        raw = gguf.GGMLQuantizationType[kind]
        block_bytes = gguf.GGML_QUANT_SIZES[raw][1]
        *rows, columns = tensor.shape
        shape = (*rows, columns // BLOCK * block_bytes)
        self._writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=raw)

    def _data(self, tensor: Tensor) -> Any:
        kind, columns = self._type(tensor), tensor.shape[-1]
        if tensor.kind == "norm":
            return np.ones(tensor.shape, np.float32)
        if tensor.kind == "bias":
            return np.zeros(tensor.shape, np.float32)
        if tensor.kind == "router":
            return self._random.standard_normal(tensor.shape, np.float32) * (ROUTER_GAIN / math.sqrt(columns))
        std = 1.0 if tensor.name == "token_embd.weight" else 1 / math.sqrt(columns)
        return self._blocks(kind, math.prod(tensor.shape) // BLOCK, std)

    def _blocks(self, kind: str, count: int, std: float) -> Any:
        """Scale before codes in each block: fp16, or an exponent."""
        if kind == "Q4_0":
            scale = np.array([std / Q4_STD], np.float16).view(np.uint8)
        else:
            scale = np.array([127 + round(math.log2(std / MXFP4_STD))], np.uint8)
        blocks = np.empty((count, len(scale) + 16), np.uint8)
        blocks[:, : len(scale)] = scale
        for first in range(0, count, POOL_BLOCKS // 2):
            part = blocks[first : first + POOL_BLOCKS // 2, len(scale) :]
            start = int(self._random.integers(0, POOL_BLOCKS - len(part) + 1))
            part[:] = self._pools[kind][start : start + len(part)]
        return blocks.reshape(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("gguf", type=Path)
    options = parser.parse_args()
    RandomGguf(options.gguf, model_of(json.loads(options.config.read_text()))).write()
    num_bytes = options.gguf.stat().st_size
    finish({"benchmark": "make_random_gguf", "shape": options.config.stem, "gguf_bytes": num_bytes})


if __name__ == "__main__":
    main()
