"""Where a decode token's time goes: inside native calls, and in Python and torch around them.

    python benchmarks/token_profile.py [STORE] [--threads 1] [--tokens 32] [--plain]

CPU time of the thread that generates, so that other work on the machine counts less; with one thread it is all there
is. Every expert is read first, so that layers pass in spans; `--layer-by-layer` computes each by two native calls.
`--plain` loads without the fast path, and shows the parts of layers. `share_of_token_outside` is of the whole token,
sampling included. The last line of stdout is one JSON document.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from inspect import isroutine
from typing import Any

from harness import HOT_SAMPLING, bind_to_cores, finish, prompt_ids

import offload_moe  # noqa: F401  before torch, as the command does: it sets how OpenMP's threads wait

NATIVE_CALLS = (
    *("om_span_pass", "om_layer_step", "om_moe_forward", "om_linear_forward"),
    *("om_attention_step", "om_router_step", "om_norm", "om_add_shared"),
)


class Clock:
    """Seconds and calls per part, while it is on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            result = function(*args, **kwargs)
            self.seconds[part] += time.thread_time() - began
            self.calls[part] += 1
            return result

        return call

    def reset(self) -> None:
        self.seconds.clear()
        self.calls.clear()


def watch(hf: Any, clock: Clock) -> None:
    """Time all that gives logits, the head, and what lies between them: the pass, or the modules that are called."""
    from offload_moe.chat.ahead import GuessedRows
    from offload_moe.decode.forward import DecoderForward
    from offload_moe.decode.layer import NativeLayer
    from offload_moe.decode.plan import PassPlan

    if isinstance(hf.get_decoder().forward, DecoderForward):  # a forward that is set on a module would bypass the pass
        PassPlan.__call__ = clock.timed("pass", PassPlan.__call__)
        NativeLayer.__call__ = clock.timed("layers", NativeLayer.__call__)
    else:
        watch_modules(hf, clock)
    head = hf.get_output_embeddings()
    head.forward = clock.timed("head", head.forward)
    GuessedRows.next = clock.timed("forward", GuessedRows.next)


def watch_modules(hf: Any, clock: Clock) -> None:
    """Time the parts of every layer by the names of their classes."""
    kinds_watched: set[type] = set()
    for module in hf.modules():
        name = type(module).__name__
        kinds = {"RMSNorm": "norms", "Attention": "attention", "Router": "router", "Experts": "experts"}
        part = next((part for end, part in kinds.items() if name.endswith(end)), None)
        if name.endswith("DecoderLayer"):
            part = "layers"
        if part is None:
            continue
        kind = type(module.forward)
        if isroutine(module.forward):
            module.forward = clock.timed(part, module.forward)
        elif kind not in kinds_watched:  # an object that others use too, so it stays
            kinds_watched.add(kind)
            kind.__call__ = clock.timed(part, kind.__call__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", default="demo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--layer-by-layer", action="store_true", help="no span of layers in one native call")
    options = parser.parse_args()
    bind_to_cores(options.threads)
    import torch

    from offload_moe import load
    from offload_moe.chat.prompt import stream_tokens
    from offload_moe.native import kernels
    from offload_moe.native.bindings import library

    clock = Clock()
    for name in NATIVE_CALLS:  # before the kernels look their functions up
        native = getattr(library(), name)
        setattr(library(), name, clock.timed(name, native))
    torch.set_num_threads(options.threads)
    kernels.set_threads(options.threads)
    if options.layer_by_layer:
        from offload_moe.decode import plan

        plan.span_kind = lambda hierarchy, layer: None
    model = load(options.store, fast_path=not options.plain)
    for layer, stored in enumerate(model.store.layers):
        with model.engine.hierarchy.scheduler.acquire(layer, range(stored.num_experts)) as lease:
            for _ in lease:
                pass
    watch(model.hf, clock)
    model.hf.generation_config.eos_token_id = None
    ids, began_s = torch.tensor([prompt_ids(0, 16)]), 0.0
    for seed in range(2):
        torch.manual_seed(seed)
        with stream_tokens(model.hf, None, ids, **HOT_SAMPLING, max_new_tokens=options.tokens) as tokens:
            for count, _ in enumerate(tokens, 1):
                if count == 1:
                    clock.reset()
                    began_s = time.thread_time()
    token_ms = 1e3 * (time.thread_time() - began_s) / (options.tokens - 1)
    num_tokens = options.tokens - 1
    parts = {part: 1e3 * seconds / num_tokens for part, seconds in clock.seconds.most_common()}
    in_native = sum(parts.get(name, 0.0) for name in NATIVE_CALLS)
    for part, ms in parts.items():
        calls = clock.calls[part] / num_tokens
        print(f"{part:20s} {ms:8.3f} ms a token {calls:7.1f} calls {1e3 * ms / calls:9.1f} us a call", file=sys.stderr)
    finish(
        {
            "benchmark": "token_profile",
            "store": options.store,
            "threads": options.threads,
            "fast_path": not options.plain,
            "in_spans": not (options.plain or options.layer_by_layer),
            "ms_per_token": parts,
            "token_ms": token_ms,
            "share_outside_of_native_calls": 1 - in_native / parts["forward"],
            "share_of_token_outside": 1 - in_native / token_ms,
        }
    )
    model.close()


if __name__ == "__main__":
    main()
