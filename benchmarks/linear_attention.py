"""What a token costs in a layer of linear attention beside its linears: torch's operators at Qwen3-Next's sizes.

    python benchmarks/linear_attention.py [--threads 1] [--layers 8] [--tokens 24]

CPU milliseconds per token and layer of the thread that computes, behind a prompt; between two layers so many bytes are
read as experts have, so that nothing is in the caches. `outside_ms`: without the linears, which our kernels compute in
a store. `bound_ms`: what reading and writing the recurrent and the convolution state takes at the rate of a plain read.
The last line of stdout is one JSON document.
"""

import argparse
import time
from typing import Any

from harness import bind_to_cores, finish, spread
from plain_read import PlainRead

SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
EXPERT_BYTES = 16 << 20  # of ten experts and a shared one, in nf4
NUM_PROMPT = 16


class Timed:
    """Thread time inside of a module's linears."""

    def __init__(self, module: Any) -> None:
        self.seconds, self._began = 0.0, 0.0
        for part in (module.in_proj_qkvz, module.in_proj_ba, module.out_proj):
            part.register_forward_pre_hook(self._enter)
            part.register_forward_hook(self._leave)

    def _enter(self, *_: object) -> None:
        self._began = time.thread_time()

    def _leave(self, *_: object) -> None:
        self.seconds += time.thread_time() - self._began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    bind_to_cores(options.threads)
    import torch
    from transformers import DynamicCache, Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    torch.set_num_threads(options.threads)
    config = Qwen3NextConfig(
        **SIZES, num_hidden_layers=options.layers, layer_types=["linear_attention"] * options.layers
    )
    memory = PlainRead(options.threads, EXPERT_BYTES)
    with torch.inference_mode():
        layers = [Qwen3NextGatedDeltaNet(config, index).eval() for index in range(options.layers)]
        timed, cache = [Timed(layer) for layer in layers], DynamicCache(config=config)
        for layer in layers:
            layer(torch.randn(1, NUM_PROMPT, config.hidden_size), cache_params=cache)
        whole, outside = [], []
        for _ in range(options.tokens):
            before, spent = sum(each.seconds for each in timed), 0.0
            for layer in layers:
                memory.read()
                x = torch.randn(1, 1, config.hidden_size)
                began = time.thread_time()
                layer(x, cache_params=cache)
                spent += time.thread_time() - began
            whole.append(1e3 * spent / options.layers)
            outside.append(whole[-1] - 1e3 * (sum(each.seconds for each in timed) - before) / options.layers)
    state_bytes = 4 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    state_bytes += 4 * config.linear_conv_kernel_dim * layers[0].conv_dim
    rate = memory.read()["bytes_per_s"]
    finish(
        {
            "benchmark": "linear_attention",
            "threads": options.threads,
            "layers": options.layers,
            "step_ms": spread(whole),
            "outside_ms": spread(outside),
            "bound_ms": 1e3 * 2 * state_bytes / rate,
            "read_bytes_per_s": rate,
        }
    )


if __name__ == "__main__":
    main()
