"""What a token costs beside the model's forward: our step loop and transformers' `generate()`, in turn.

    python benchmarks/step_overhead.py [MODEL] [--trials 5] [--tokens 48]

CPU milliseconds of the thread that generates, without those inside the model's forward, per decoded token; the prompt
is left out. Greedy, and with temperature, top-k and top-p. The last line of stdout is one JSON document.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from harness import alternate, finish, paired_ratio, spread

import offload_moe  # noqa: F401  before torch, as the command does: it sets how OpenMP's threads wait

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 0},
    "unseeded": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "top-p": {"temperature": 0.8, "top_k": 0, "top_p": 0.9},
}
NUM_PROMPT_TOKENS = 16


class OutsideOfForward:
    """Thread time between the forwards of a model, from the end of the first one."""

    def __init__(self, hf: Any) -> None:
        self.seconds, self._left_at = 0.0, None
        self._handles = [hf.register_forward_pre_hook(self._enter, prepend=True), hf.register_forward_hook(self._leave)]

    def _enter(self, *_: object) -> None:
        if self._left_at is not None:
            self.seconds += time.thread_time() - self._left_at

    def _leave(self, *_: object) -> None:
        self._left_at = time.thread_time()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def ms_per_token(hf: Any, generate: Callable[[], Iterable[Any]], num_tokens: int) -> float:
    clock = OutsideOfForward(hf)
    try:
        for _ in generate():
            pass
    finally:
        clock.remove()
    return clock.seconds * 1e3 / (num_tokens - 1)


def measure(model: Any, options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from offload_moe.chat.prompt import stream_tokens

    ids = torch.arange(5, 5 + NUM_PROMPT_TOKENS)[None]
    drawn = {name: value for name, value in settings.items() if name not in ("seed", "temperature")}
    if settings["temperature"]:
        drawn |= {"do_sample": True, "temperature": settings["temperature"]}
    else:
        drawn |= {"do_sample": False}
    ways: dict[str, Callable[[], Iterable[Any]]] = {
        "step loop": partial(stream_tokens, model.hf, model.tokenizer, ids, max_new_tokens=options.tokens, **settings),
        "generate()": lambda: [model.hf.generate(ids, max_new_tokens=options.tokens, disable_compile=True, **drawn)],
    }
    times = alternate(
        {name: partial(ms_per_token, model.hf, way, options.tokens) for name, way in ways.items()},
        num_trials=options.trials,
    )
    return {
        "cpu_ms_per_token": {name: spread(values) for name, values in times.items()},
        "ratio": paired_ratio(times, "step loop", "generate()"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    from offload_moe import load

    with load(options.model, context=512) as model:
        model.hf.generation_config.eos_token_id = None
        found = {name: measure(model, options, settings) for name, settings in SETTINGS.items()}
    for name, result in found.items():
        print(name, {way: round(each["median"], 3) for way, each in result["cpu_ms_per_token"].items()})
    finish({"benchmark": "step_overhead", "label": "measured", "num_tokens": options.tokens, **found})


if __name__ == "__main__":
    main()
