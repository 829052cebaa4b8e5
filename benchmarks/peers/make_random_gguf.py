"""Write a GGUF file with random weights in the shape of a model, for llama.cpp to be measured on.

Usage: python benchmarks/peers/make_random_gguf.py CONFIG.json OUT.gguf [--mixture Q4_K_M]

Matrices are Q4_0 or of llama.cpp's mixture Q4_K_M, experts of gpt-oss MXFP4, routers, norms and biases fp32. Which
models: gguf_shapes.py. Weights have zero mean (with a mean, every token collapses onto the same experts) and unit gain.
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
from harness import finish
from peers.gguf_mixture import MIXTURES, matrix_type
from peers.gguf_shapes import Model, Tensor, model_of

POOL_BYTES = 1 << 25
NUM_SAMPLES = 4096  # blocks whose spread is taken
# Where a block has its fp16 scale and its minimum's, and what they are beside each other so that the mean is zero.
SCALES = {
    **{kind: {0: 1.0} for kind in ("Q4_0", "Q5_0", "Q8_0")},
    "Q4_K": {0: 1.0, 2: 7.5},
    "Q5_K": {0: 1.0, 2: 15.5},
    "Q5_1": {0: 1.0, 2: -15.5},
    "Q6_K": {208: 1.0},
}
ONE = 127  # the exponent of a scale in MXFP4
ROUTER_GAIN = 2.0  # router logits of this spread give a top-k that differs from token to token


class BlockPool:
    """Random blocks of one type. Runs of them make matrices, so that writing is as fast as the disk."""

    def __init__(self, kind: str, random: np.random.Generator) -> None:
        self._raw, self._random = gguf.GGMLQuantizationType[kind], random
        self.block_size, self.block_bytes = gguf.GGML_QUANT_SIZES[self._raw]
        self._scales = SCALES.get(kind)
        self._blocks = random.integers(0, 256, (POOL_BYTES // self.block_bytes, self.block_bytes), np.uint8)
        if kind == "Q4_0":  # codes of 1 to 15: their mean is the zero
            low, high = (random.integers(1, 16, (len(self._blocks), 16), np.uint8) for _ in range(2))
            self._blocks[:, 2:] = low | high << 4
        samples = self._blocks[:NUM_SAMPLES].copy()
        self._set_scale(samples, 1.0)
        self._spread = float(gguf.dequantize(samples, self._raw).std())

    def _set_scale(self, blocks: Any, scale: float) -> None:
        if self._scales is None:
            blocks[:, 0] = ONE + round(math.log2(scale))
            return
        for offset, factor in self._scales.items():
            blocks[:, offset : offset + 2] = np.array([scale * factor], np.float16).view(np.uint8)

    def take(self, num_weights: int, std: float) -> Any:
        """Bytes of so many weights of that spread."""
        blocks = np.empty((num_weights // self.block_size, self.block_bytes), np.uint8)
        most = len(self._blocks) // 2
        for first in range(0, len(blocks), most):
            part = blocks[first : first + most]
            start = int(self._random.integers(0, len(self._blocks) - len(part) + 1))
            part[:] = self._blocks[start : start + len(part)]
        self._set_scale(blocks, std / self._spread)
        return blocks.reshape(-1)


class RandomGguf:
    """One file being written."""

    def __init__(self, path: Path, model: Model, mixture: str) -> None:
        self._model = model
        self._random = np.random.default_rng(0)
        self._writer = gguf.GGUFWriter(str(path), model.architecture)
        self._types = {tensor.name: matrix_type(mixture, model, tensor) for tensor in model.tensors}
        kinds = sorted(set(self._types.values()) - {"F32"})
        self._pools = {kind: BlockPool(kind, self._random) for kind in kinds}

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
        tokens[256] = "ab"  # that the merge makes
        self._writer.add_tokenizer_model("gpt2")
        self._writer.add_tokenizer_pre("gpt-2")
        self._writer.add_token_list(tokens)
        self._writer.add_token_types([1] * vocabulary)
        self._writer.add_token_merges(["a b"])
        self._writer.add_bos_token_id(0)
        self._writer.add_eos_token_id(1)

    def _declare(self, tensor: Tensor) -> None:
        kind = self._types[tensor.name]
        if kind == "F32":
            self._writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), 4 * math.prod(tensor.shape))
            return
        pool = self._pools[kind]
        *rows, columns = tensor.shape
        shape = (*rows, columns // pool.block_size * pool.block_bytes)
        raw = gguf.GGMLQuantizationType[kind]
        self._writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=raw)

    def _data(self, tensor: Tensor) -> Any:
        columns = tensor.shape[-1]
        if tensor.kind == "norm":
            return np.ones(tensor.shape, np.float32)
        if tensor.kind == "bias":
            return np.zeros(tensor.shape, np.float32)
        if tensor.kind == "router":
            return self._random.standard_normal(tensor.shape, np.float32) * (ROUTER_GAIN / math.sqrt(columns))
        std = 1.0 if tensor.name == "token_embd.weight" else 1 / math.sqrt(columns)
        return self._pools[self._types[tensor.name]].take(math.prod(tensor.shape), std)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--mixture", choices=MIXTURES, default="Q4_0")
    options = parser.parse_args()
    RandomGguf(options.gguf, model_of(json.loads(options.config.read_text())), options.mixture).write()
    num_bytes = options.gguf.stat().st_size
    finish({"benchmark": "make_random_gguf", "shape": options.config.stem, "gguf_bytes": num_bytes})


if __name__ == "__main__":
    main()
