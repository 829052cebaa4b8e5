"""A token in a layer of linear attention (Qwen3-Next's sizes) beside its linears: transformers' module and our step.

    python benchmarks/linear_attention.py [--threads 1] [--layers 8] [--tokens 24]

CPU milliseconds per token and layer of the thread that computes, behind a prompt, in turn; between two layers so many
bytes are read as experts have, so that nothing is in the caches. `outside_ms`: without the linears, which our kernels
compute in a store. `bound_ms`: what reading and writing the recurrent and the convolution state takes at the rate of a
plain read. The last line of stdout is one JSON document.
"""

import argparse
import time
from typing import Any

from harness import bind_to_cores, finish, spread
from plain_read import PlainRead

import offload_moe  # noqa: F401  before torch, as the command does: it sets how OpenMP's threads wait

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

    from offload_moe.decode.delta import DeltaForward
    from offload_moe.families.cache_name import with_states
    from offload_moe.native import kernels

    torch.set_num_threads(options.threads)
    kernels.set_threads(options.threads)
    config = Qwen3NextConfig(
        **SIZES, num_hidden_layers=options.layers, layer_types=["linear_attention"] * options.layers
    )
    memory = PlainRead(options.threads, EXPERT_BYTES)
    with torch.inference_mode():
        layers = [Qwen3NextGatedDeltaNet(config, index).eval() for index in range(options.layers)]
        timed = [Timed(layer) for layer in layers]
        ways = {"module": [layer.forward for layer in layers], "native": [DeltaForward(layer) for layer in layers]}
        caches = {way: DynamicCache(config=config) for way in ways}
        for way, forwards in ways.items():
            for forward in forwards:
                forward(torch.randn(1, NUM_PROMPT, config.hidden_size), **with_states(caches[way]))
        found: dict[str, dict[str, list[float]]] = {way: {"step_ms": [], "outside_ms": []} for way in ways}
        for _ in range(options.tokens):
            for way, forwards in ways.items():
                before, spent = sum(each.seconds for each in timed), 0.0
                for forward in forwards:
                    memory.read()
                    x = torch.randn(1, 1, config.hidden_size)
                    began = time.thread_time()
                    forward(x, **with_states(caches[way]))
                    spent += time.thread_time() - began
                inside = sum(each.seconds for each in timed) - before
                found[way]["step_ms"].append(1e3 * spent / options.layers)
                found[way]["outside_ms"].append(1e3 * (spent - inside) / options.layers)
    state_bytes = 4 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    state_bytes += 4 * config.linear_conv_kernel_dim * layers[0].conv_dim
    rate = memory.read()["bytes_per_s"]
    finish(
        {
            "benchmark": "linear_attention",
            "threads": options.threads,
            "layers": options.layers,
            **{way: {name: spread(values) for name, values in each.items()} for way, each in found.items()},
            "bound_ms": 1e3 * 2 * state_bytes / rate,
            "read_bytes_per_s": rate,
        }
    )


if __name__ == "__main__":
    main()
