"""Prompt and decode tokens per second of llama.cpp (PyPI wheel `xllamacpp`) on a GGUF file, and bytes read from disk.

Usage: python benchmarks/peers/run_llamacpp.py MODEL.gguf --threads 2 --tokens 32 --prompt-tokens 64 [--no-repack]

The last line of stdout is one JSON document.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import HOT_SAMPLING, bind_to_cores, finish, has_llamacpp, io_bytes, peak_rss_bytes, prompt_ids


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
    if not has_llamacpp():
        sys.exit(1)
    import xllamacpp

    bind_to_cores(options.threads)
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
        before = io_bytes()["from_disk"]
        request = {
            "prompt": prompt_ids(seed, options.prompt_tokens),
            **HOT_SAMPLING,
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
                "disk_bytes": io_bytes()["from_disk"] - before,
            }
        )
    finish({"load_s": load_s, "peak_rss_bytes": peak_rss_bytes(), "runs": runs})


if __name__ == "__main__":
    main()
