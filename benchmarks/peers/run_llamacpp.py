"""Prompt and decode tokens per second of llama.cpp on a GGUF file, and bytes read from disk.

Usage: PYTHON benchmarks/peers/run_llamacpp.py MODEL.gguf --threads 2 --tokens 32 --prompt-tokens 64 [--mapped]
       [--flash-attention off] [--keys q8_0] [--values f16] [--ubatch 512]
       [--no-repack] [--huge-pages]

PYTHON is one that has `llama-cpp-python`, built for this processor (docs/benchmarks.md), or else the wheel
`xllamacpp`, for which attention, keys and values are as it has them. `--huge-pages` is glibc's setting, for llama.cpp
asks for none where the system gives them only on request. The last line of stdout is one JSON document. With `--live`
it answers requests instead, see live.py; `--describe` says which build this is.
"""

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import llamacpp_native
import llamacpp_wheel
from harness import finish, has_llamacpp, peak_rss_bytes
from live import Answers, measured_runs

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # read when a program starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--flash-attention", choices=list(llamacpp_native.FLASH_ATTENTION), default="auto")
    parser.add_argument("--keys", choices=list(llamacpp_native.CACHE_TYPES), default="f16")
    parser.add_argument("--values", choices=list(llamacpp_native.CACHE_TYPES), default="f16")
    parser.add_argument("--ubatch", type=int, default=512)
    # Repacked weights are private copies that would not fit under a memory limit.
    parser.add_argument("--mapped", action="store_true", help="the file stays mapped, and so is not repacked")
    parser.add_argument("--no-repack", action="store_true", help="weights in the order of the file")
    parser.add_argument("--huge-pages", action="store_true")
    parser.add_argument("--slots", type=int, default=1, help="sequences that a context has, of a native build")
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--describe", action="store_true")
    options = parser.parse_args()
    if options.huge_pages and not HUGE_PAGES.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | HUGE_PAGES)
    is_native = find_spec("llama_cpp") is not None
    if not is_native and not has_llamacpp():
        sys.exit(1)
    if options.describe:
        print(json.dumps(llamacpp_native.describe() if is_native else llamacpp_wheel.describe()))
    else:
        run(llamacpp_native.NativeEngine if is_native else llamacpp_wheel.WheelEngine, options)


def run(kind: Any, options: argparse.Namespace) -> None:
    answers = Answers() if options.live else None
    engine = kind(options)
    if answers is not None:
        answers.serve(engine, engine.figures)
    else:
        finish({**engine.figures, "runs": measured_runs(engine, options), "peak_rss_bytes": peak_rss_bytes()})


if __name__ == "__main__":
    main()
