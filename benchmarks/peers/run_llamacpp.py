"""Prompt and decode tokens per second of llama.cpp (PyPI wheel `xllamacpp`) on a GGUF file, and bytes read from disk.

Usage: python benchmarks/peers/run_llamacpp.py MODEL.gguf --threads 2 --tokens 32 --prompt-tokens 64 [--no-repack]

Sampling is hot on purpose: with random weights, greedy decoding repeats one token and so one set of experts. The last
line of stdout is one JSON document.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

import xllamacpp


def read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    # Repacked weights are private copies that would not fit under a memory limit.
    parser.add_argument("--no-repack", action="store_true")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = options.context, 1, False, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.no_extra_bufts = options.no_repack
    began = time.perf_counter()
    server = xllamacpp.Server(params)
    load_s = time.perf_counter() - began
    runs = []
    for seed in range(options.runs):
        before = read_bytes()
        request = {
            "prompt": [(i * 37 + seed * 101) % 20000 + 300 for i in range(options.prompt_tokens)],
            "temperature": 50.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "seed": seed,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        marks = [time.process_time()]
        for num_tokens in (1, options.tokens):  # the first is there to tell the prompt's CPU time from that of decoding
            answer = server.handle_completions({**request, "n_predict": num_tokens})
            marks.append(time.process_time())
        decode_cpu_s = (marks[2] - marks[1]) - (marks[1] - marks[0])
        timings = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
        runs.append(
            {
                "prompt_tokens_per_s": timings["prompt_per_second"],
                "decode_tokens_per_s": timings["predicted_per_second"],
                "decode_cpu_ms": 1e3 * decode_cpu_s / (options.tokens - 1),
                "disk_bytes": read_bytes() - before,
            }
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"load_s": load_s, "peak_rss_bytes": peak, "runs": runs}))


if __name__ == "__main__":
    main()
