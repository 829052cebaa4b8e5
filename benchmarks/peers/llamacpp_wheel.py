"""llama.cpp as its prebuilt wheel `xllamacpp` has it, which is for AVX2; it is reached through its server.

Needs the standard library and that package only.
"""

import argparse
import json
import time
from importlib.metadata import version
from typing import Any

from harness import HOT_SAMPLING, bind_to_cores, io_bytes, prompt_ids


def describe() -> dict[str, Any]:
    return {"build": f"xllamacpp {version('xllamacpp')}"}


class WheelEngine:
    """A GGUF file in a server with one slot."""

    def __init__(self, options: argparse.Namespace) -> None:
        import xllamacpp

        bind_to_cores(options.threads)
        params = xllamacpp.CommonParams()
        params.model.path = options.model
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = options.context, 1, False, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
        params.no_extra_bufts = options.mapped or options.no_repack
        began = time.perf_counter()
        self._server = xllamacpp.Server(params)
        self._request: dict[str, Any] = {}
        self.figures = {"load_s": time.perf_counter() - began}

    def prompt(self, *, num_tokens: int, seed: int, all_cores: bool = False) -> dict[str, float]:
        """The server has one number of threads, so `all_cores` changes nothing."""
        read = io_bytes()["from_disk"]
        self._request = {
            "prompt": prompt_ids(seed, num_tokens),
            **HOT_SAMPLING,
            "min_p": 0.0,
            "seed": seed,
            "ignore_eos": True,
        }
        began_cpu_s = time.process_time()
        timings = self._complete(1, keep=False)
        return {
            "prompt_tokens_per_s": timings["prompt_per_second"],
            "prompt_cpu_ms": 1e3 * (time.process_time() - began_cpu_s) / num_tokens,
            "prompt_disk_bytes": io_bytes()["from_disk"] - read,
        }

    def decode(self, *, num_tokens: int) -> dict[str, float]:
        """From the end of the prompt again, whose last token is computed with it: subtracted by a first request."""
        read, marks = io_bytes()["from_disk"], [time.process_time()]
        timings: dict[str, float] = {}
        for num_predicted in (1, 1 + num_tokens):
            timings = self._complete(num_predicted, keep=True)
            marks.append(time.process_time())
        cpu_s = (marks[2] - marks[1]) - (marks[1] - marks[0])
        return {
            "decode_tokens_per_s": 1e3 * num_tokens / timings["predicted_ms"],
            "decode_cpu_ms": 1e3 * cpu_s / num_tokens,
            "decode_disk_bytes": io_bytes()["from_disk"] - read,
        }

    def _complete(self, num_predicted: int, *, keep: bool) -> dict[str, float]:
        answer = self._server.handle_completions({**self._request, "n_predict": num_predicted, "cache_prompt": keep})
        document = json.loads(answer) if isinstance(answer, str) else answer
        return dict(document["timings"])
